-- What a rebase writes: the cluster that the log speaks of and the one it is in, and a tx_base above every place in the order of
-- commits that is there. The highest commit is found by index, as are the log's last events and runs. What else holds such
-- places (of transactions that committed nothing, sweeps, deletions) is above the highest commit by as many as its cluster
-- began since: fewer than 2^40, which leaves room for millions of rebases.
select (select c.system_identifier from tidemark.cluster c),
       (select k.system_identifier from pg_control_system() k),
       coalesce(greatest(
           (select c.tx_base from tidemark.cluster c),
           (select o.tx from tidemark.objects o order by o.tx desc limit 1),
           (select max(greatest(e.tx, r.last_tx, r.seen_tx))
            from tidemark.topic_partitions p
            left join lateral (
                select m.tx from tidemark.record_batch_events m where m.partition_id = p.id order by m.tx desc limit 1
            ) e on true
            left join lateral (
                select n.last_tx, n.seen_tx from tidemark.runs n where n.partition_id = p.id order by n.start_offset desc limit 1
            ) r on true)
       ), 0) + 1099511627776
