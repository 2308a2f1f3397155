-- The indexes of the seed's page, in the order of columns it gives.
create index idx_rbe_unprocessed_ordered on seed.record_batch_events (topic_id, partition, processed, created_at);
create index idx_topic_partition_lookup on seed.topic_partitions (topic_id, partition);
