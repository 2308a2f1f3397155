-- First statement of every transaction that materializes or deletes.
-- Read committed is what makes a place step safe: its snapshot must be taken after the lock was waited for. The planner is left
-- no way to a plan that costs more as the log grows: statistics of a queue are always out of date, and a plan cached for an
-- empty table would scan a full one. A hash join would read all partitions in order to update a few.
set transaction isolation level read committed;
set local enable_seqscan = off;
set local enable_bitmapscan = off;
set local enable_mergejoin = off;
set local enable_hashjoin = off;
set local jit = off;
