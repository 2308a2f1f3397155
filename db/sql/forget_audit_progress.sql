-- Makes the next audit read partitions $1 from their first batch on; all partitions, where $1 is null.
delete from tidemark.audit_progress a
where $1::int[] is null or a.partition_id = any ($1::int[])
