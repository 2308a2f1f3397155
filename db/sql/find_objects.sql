-- Key and id of the committed objects whose key starts with $1.
select o.key, o.id
from tidemark.objects o
where o.key ^@ $1::text
