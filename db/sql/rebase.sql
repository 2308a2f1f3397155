-- name: rebase
-- What a rebase writes: the cluster that the log speaks of and the one it is in, and a tx_base above every place in the order of
-- commits that is there. The highest commit is found by index, as are the log's last events and runs. What else holds such
-- places (of transactions that committed nothing, sweeps, deletions) is above the highest commit by as many as its cluster
-- began since: fewer than 2^40, which leaves room for millions of rebases.
select (select c.system_identifier from tidemark.cluster c) as was,
       (select k.system_identifier from pg_control_system() k) as now,
       coalesce(greatest(
           (select c.tx_base from tidemark.cluster c),
           (select o.tx from tidemark.objects o order by o.tx desc limit 1),
           (select max(greatest(e.tx, r.last_tx, r.seen_tx))
            from tidemark.topic_partitions p
            left join lateral (
                select m.tx from tidemark.record_batch_events m where m.partition_id = p.id order by m.tx desc limit 1
            ) e on true
            left join lateral tidemark.newest_run(p.id) r on true)
       ), 0) + 1099511627776 as base;

-- name: lock_cluster
-- Commits and passes have read the row, so they are waited for; those that come wait for us.
lock table tidemark.cluster in access exclusive mode;

-- name: truncate_cluster
-- Before the new row is inserted. It is not updated: a snapshot from before would go on with the old base. From a truncated
-- table it gets no row, also not the old one, and tx_base() refuses.
truncate tidemark.cluster;

-- name: insert_cluster
-- $1 system identifier of the cluster, $2 its tx_base.
insert into tidemark.cluster (system_identifier, tx_base)
values ($1::bigint, $2::bigint);

-- name: raise_sequences
-- Puts sequences that were left behind above what is there, as after a restore of data alone or a switch to a logical replica:
-- ids would be given twice, and the newest row of what is appended would not be the last one. Never lowers one.
select setval(s.name, s.highest)
from (values
    ('tidemark.objects_id_seq'::regclass, (select max(o.id) from tidemark.objects o)),
    ('tidemark.topic_partitions_id_seq', (select greatest((select max(p.id) from tidemark.topic_partitions p),
                                                          (select max(a.partition_id) from tidemark.adopted_partitions a),
                                                          (select max(d.partition_id) from tidemark.deleted_partitions d)))),
    ('tidemark.fan_outs_id_seq', (select max(f.id) from tidemark.fan_outs f)),
    ('tidemark.producers_id_seq', (select max(greatest(p.id, b.producer_id))
                                   from (select max(q.id) as id from tidemark.producers q) p
                                   cross join (select max(c.producer_id) as producer_id from tidemark.producer_batches c) b)),
    ('tidemark.collections_id_seq', (select max(l.id) from tidemark.collections l)),
    ('tidemark.sweeps_id_seq', (select max(w.id) from tidemark.sweeps w))
) s(name, highest)
where s.highest > coalesce(pg_sequence_last_value(s.name), 0);
