-- What the page does not name and its statement wants: only unprocessed events, in the order they are taken. Marking an
-- event then removes it from the index, and `processed` may still not be updated in place.
create index idx_rbe_pending on seed.record_batch_events (created_at) where not processed;
create index idx_topic_partition_lookup on seed.topic_partitions (topic_id, partition);
