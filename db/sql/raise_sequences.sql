-- Puts sequences that were left behind above what is there, as after a restore of data alone or a switch to a logical replica:
-- ids would be given twice, and the newest row of what is appended would not be the last one. Never lowers one.
select setval(s.name, s.highest)
from (values
    ('tidemark.objects_id_seq'::regclass, (select max(o.id) from tidemark.objects o)),
    ('tidemark.topic_partitions_id_seq', (select max(p.id) from tidemark.topic_partitions p)),
    ('tidemark.fan_outs_id_seq', (select max(f.id) from tidemark.fan_outs f)),
    ('tidemark.sweeps_id_seq', (select max(w.id) from tidemark.sweeps w))
) s(name, highest)
where s.highest > coalesce(pg_sequence_last_value(s.name), 0)
