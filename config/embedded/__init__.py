"""Postgres and Redis without an installation: what runs where no URL is configured.

Both come as wheels (extra `embedded`), run in the data directory without root, Docker or system packages, and
are shared by every process that attaches to that directory. The last one to leave turns them off.
"""
