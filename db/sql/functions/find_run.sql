-- The first run of a log, in the order of offsets, that reached a place in the order of commits (of_tx, of_id), or else the first
-- one up to which there was a timestamp of at least of_timestamp. Neither falls along the offsets. No row: there is none yet.
--
-- Looks near the end first, at twice the distance each time, and then between the last two: log(runs) descents, and a few for
-- what is new. It never looks below what is deleted: dead rows may lie there, without number.
create or replace function tidemark.find_run(partition_id int, of_tx bigint, of_id bigint, of_timestamp bigint)
returns setof tidemark.runs
language plpgsql stable
-- Whoever calls it has turned off the plans that read whole tables: here that would take half of the time.
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Too early (its offset), and late enough.
    low bigint;
    found tidemark.runs;
    probe tidemark.runs;
    reached boolean;
    step bigint;
begin
    select * into found from tidemark.newest_run(find_run.partition_id);
    reached := case when of_timestamp is null
        then (coalesce(found.seen_tx, found.last_tx),
              coalesce(case when found.seen_tx is null then found.last_id else found.seen_id end, 9223372036854775807))
             >= (of_tx, of_id)
        else found.max_timestamp >= of_timestamp end;
    if reached then
        low := coalesce((select s.deleted_to from tidemark.log_start(find_run.partition_id) s), 0) - 1;
        step := found.end_offset - found.start_offset;
        while found.start_offset > low + 1 loop
            -- It holds the place itself, so the one before has not reached it.
            exit when of_timestamp is null and found.seen_tx is null
                and (of_tx, of_id) >= (found.first_tx, coalesce(found.first_id, -9223372036854775808));
            -- Going back from the end while nothing too early is known; then the middle, and after it the next one at once.
            select r.* into probe
            from tidemark.runs r
            where r.partition_id = find_run.partition_id
              and r.start_offset <= case when step > 0 then greatest(found.start_offset - step, low + 1)
                                         else low + (found.start_offset - low) / 2 end
            order by r.start_offset desc
            limit 1;
            exit when probe.start_offset is null;
            if probe.start_offset <= low then
                -- Nothing begins in the lower half.
                select r.* into probe
                from tidemark.runs r
                where r.partition_id = find_run.partition_id and r.start_offset > low
                order by r.start_offset
                limit 1;
            end if;
            reached := case when of_timestamp is null
                then (coalesce(probe.seen_tx, probe.last_tx),
                      coalesce(case when probe.seen_tx is null then probe.last_id else probe.seen_id end, 9223372036854775807))
                     >= (of_tx, of_id)
                else probe.max_timestamp >= of_timestamp end;
            if reached then
                exit when probe.start_offset = found.start_offset;
                found := probe;
                step := 2 * step;
            else
                low := probe.start_offset;
                step := 0;
            end if;
        end loop;
        return next found;
    end if;
end
$$;

-- The run that holds an event; no row while it is pending.
create or replace function tidemark.run_of(partition_id int, tx bigint, id bigint) returns setof tidemark.runs
language sql stable parallel safe
begin atomic
    select h.*
    from tidemark.find_run(run_of.partition_id, run_of.tx, run_of.id, null) f
    cross join lateral (
        select f.seen_tx is null and (run_of.tx, run_of.id) >= (f.first_tx, coalesce(f.first_id, -9223372036854775808))
               and (f.skipped is null or run_of.tx <> all (f.skipped)) as is_inside
    ) i
    cross join lateral (
        select f.* where i.is_inside
        union all
        -- It came late, and has a run of its transaction's.
        (select r.*
         from tidemark.runs r
         where not i.is_inside and r.partition_id = run_of.partition_id and r.seen_tx is not null and r.first_tx = run_of.tx
           and run_of.id between coalesce(r.first_id, -9223372036854775808) and coalesce(r.last_id, 9223372036854775807)
         limit 1)
    ) h;
end;
