-- Deletes the oldest passes from transaction $1 on, $3 at most, up to the first that met a transaction at or above $2. One row:
-- how many, and the last. The next call begins there: under a held snapshot it would read the deleted ones again.
with page as materialized (
    select q.tx, bool_and(q.in_flight[cardinality(q.in_flight)] < $2::bigint) over (order by q.tx) as is_settled
    from (
        select p.tx, p.in_flight
        from tidemark.passes p
        where p.tx > $1::bigint and p.tx < $2::bigint
        order by p.tx
        limit $3::int
    ) q
),
gone as (
    delete from tidemark.passes p using page g where p.tx = g.tx and g.is_settled returning p.tx
)
select count(*)::int, max(d.tx) from gone d
