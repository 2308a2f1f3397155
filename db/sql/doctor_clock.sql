-- The server's clock, in seconds since the epoch.
select extract(epoch from clock_timestamp())::float8
