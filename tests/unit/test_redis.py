"""Redis URLs: what each client is given, and what is no such URL."""

import pytest

from config.redis import RedisAddress


def parse(url: str) -> RedisAddress:
    return RedisAddress.parse(url)


@pytest.mark.parametrize(
    ("url", "celery"),
    [
        ("redis://host", "redis://host:6379/0"),
        ("redis://:p%2Fw@[::1]:1/5", "redis://:p%2Fw@[::1]:1/5"),
        ("rediss://me:pw@host:6390/1", "rediss://me:pw@host:6390/1?ssl_cert_reqs=required"),
        ("redis+socket:///run/a%20b.sock", "redis+socket:///run/a%20b.sock?virtual_host=0"),
        (
            "sentinel://:pw@a;sentinel://:pw@b:26380/3?master_name=m",
            "sentinel://:pw@a:26379/3;sentinel://:pw@b:26380/3",
        ),
    ],
)
def test_celery_gets_what_it_understands(url: str, celery: str) -> None:
    assert parse(url).celery_url == celery


def test_a_sentinel_is_told_by_options() -> None:
    address = parse("sentinel://:pw@a/0?master_name=m&sentinel_password=s3cret")
    assert address.celery_options == {"master_name": "m", "sentinel_kwargs": {"password": "s3cret"}}
    assert address.secrets == ("pw", "s3cret")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://host", "must start with redis://"),
        ("redis://", "needs a host"),
        ("redis://:s3cret@host/orders", "no database's number"),
        ("redis://:s3cret@host?ssl_cert_reqs=none", "has no option 'ssl_cert_reqs'"),
        ("rediss://:s3cret@host?ssl_cert_reqs=maybe", "ssl_cert_reqs must be one of"),
        ("rediss://host?ssl_ca_cert=f", "has no option 'ssl_ca_cert'; there is: ssl_ca_certs"),
        ("redis://:ab/s3cret@host", "no database's number; encode"),
        ("redis+socket://", "needs the path of a socket"),
        ("sentinel://host:26379", "needs the name of the master"),
        ("sentinel://a;redis://b?master_name=m", "needs a host: sentinel://host:port"),
    ],
)
def test_what_is_no_address(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse(url)
    assert "s3cret" not in str(caught.value)


def test_messages_name_it_without_its_password() -> None:
    for url in ("redis://me:s3cret@host:1/2", "sentinel://:s3cret@a?master_name=m&sentinel_password=s3cret"):
        assert "s3cret" not in f"{parse(url)} {parse(url)!r}"
