-- The oldest runs of a partition that are to go, in order, among the first up_to that are there: those before the start of the
-- log, and those that its topic's limits let go. Here alone stands what expired means. By size: what is left after a run still
-- has retention_bytes. By time: all batches of the run are too old, and so are the runs before it. The last batch decides,
-- not the running maximum of the runs.
--
-- A batch is as old as its newest record, but not younger than its commit: one that comes with a time far in the future, or with
-- none (-1), would keep the log for ever. So a commit is looked up only where the batch's own time decides nothing.
-- What cannot be dated stays.
--
-- The first run is found by one descent, which does not pass over those that were deleted.
create or replace function tidemark.runs_to_delete(partition_id int, up_to int)
returns setof tidemark.runs
language sql stable parallel safe
begin atomic
    select (e.run).*
    from tidemark.topic_partitions p
    join tidemark.topics t on t.id = p.topic_id
    left join lateral tidemark.log_start(p.id) s on true
    cross join lateral tidemark.newest_run(p.id) n
    cross join lateral (
        select r.run,
               bool_and((r.run).end_offset <= coalesce(s.start_offset, 0)
                        or coalesce(n.end_bytes - (r.run).end_bytes >= t.retention_bytes, false)
                        or (t.retention_ms is not null and not exists (
                            select
                            from tidemark.run_events(r.run) b
                            where (b.max_timestamp between 0 and x.before - 1
                                   or (select extract(epoch from o.committed_at) * 1000 < x.before
                                       from tidemark.objects o where o.id = b.object_id)) is not true
                        ))) over (order by (r.run).start_offset) as expired
        from (select (extract(epoch from statement_timestamp()) * 1000)::bigint - t.retention_ms as before) x
        cross join lateral (
            select c as run
            from tidemark.runs c
            where c.partition_id = p.id and c.end_offset > coalesce(s.deleted_to, 0)
              and c.start_offset >= (select f.start_offset from tidemark.run_at(p.id, coalesce(s.deleted_to, 0)) f)
            order by c.start_offset
            limit up_to
        ) r
    ) e
    where p.id = runs_to_delete.partition_id and e.expired
      and (t.retention_ms is not null or t.retention_bytes is not null or s.start_offset > s.deleted_to);
end;
