-- How far the last fan-out got: commits up to seen_tx but those of the transactions in_flight are dispatched.
select f.seen_tx, f.in_flight
from tidemark.fan_outs f
order by f.id desc
limit 1
