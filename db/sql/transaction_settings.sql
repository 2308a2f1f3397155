-- In every transaction that materializes or deletes, after `set transaction isolation level read committed`.
-- The planner is left no way to a plan that costs more as the log grows: statistics of a queue are always out of date, and a plan
-- cached for an empty table would scan a full one. A hash join would read a whole table in order to join a few rows, and so
-- would a nested loop over a materialized scan of what was a small table when the plan was made. With one plan
-- left there is nothing to plan anew: without force_generic_plan it is made again for the first executions of a prepared
-- statement, and whenever the estimates look different, which costs more than placing a hundred events.
--
-- What gives offsets is durable before anybody is told (invariant 4): an offset that was seen must survive a crash, also where a
-- role's or a pooler's default is less. A stronger setting than `on` stays.
select set_config('enable_seqscan', 'off', true),
       set_config('enable_bitmapscan', 'off', true),
       set_config('enable_mergejoin', 'off', true),
       set_config('enable_hashjoin', 'off', true),
       set_config('enable_material', 'off', true),
       set_config('jit', 'off', true),
       set_config('plan_cache_mode', 'force_generic_plan', true),
       case when current_setting('synchronous_commit') in ('off', 'local') then
           set_config('synchronous_commit', 'on', true)
       end
