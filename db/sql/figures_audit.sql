-- When an audit last got somewhere, as seconds since the epoch, and the records that no audit has read yet.
select (select extract(epoch from max(a.audited_at))::float8 from tidemark.audit_progress a),
       (select coalesce(sum(greatest(p.end_offset - greatest(coalesce(a.audited_to, 0), p.start_offset), 0)), 0)::numeric
        from tidemark.topic_partitions p
        left join tidemark.audit_progress a on a.partition_id = p.id)
