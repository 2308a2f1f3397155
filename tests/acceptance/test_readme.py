"""README.md does what it says: its blocks run, word for word, in a fresh shell with a data directory of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.readme import execute, steps_of
from tests.demo.programs import ROOT
from tests.servers import directory_for_servers

PAGE = """
```bash
export GREETING=hello
sleep 300 &
```
```console
$ echo "$GREETING" \\
>     world      # a comment
hello … world
$ echo two
one
```

```sql
select 6 * 7 as answer;
```

```text
 answer
--------
     42
```

```python
print("no", undefined)
```

<!-- not run: needs Docker -->
```sh
docker compose up
```

```sh
false
true
```
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with directory_for_servers() as made:
        yield made


def test_a_page_with_mistakes(directory: Path, database_url: str) -> None:
    """One shell runs all of it, and each mistake is found: wrong output, an exception, a command that fails."""
    page = PAGE.replace("hello … world", "hello w…")
    wrong = execute(page, directory, TIDEMARK_DATABASE_URL=database_url)
    steps = [line.split(":")[1].strip().split("\n")[0] for line in wrong]
    assert steps == ["echo two", 'print("no", undefined)', "false"]
    assert "'one' is not printed" in wrong[0]
    assert "NameError: name 'undefined' is not defined" in wrong[1]


def test_a_command_that_does_not_end(directory: Path) -> None:
    (wrong,) = execute("```sh\nsleep 300\n```\n```sh\necho on\n```\n", directory, timeout=0.5)
    assert wrong == "line 2: sleep 300: still runs after 0.5 s"


def test_a_block_is_left_out_for_known_reasons_only() -> None:
    with pytest.raises(ValueError, match="line 3: 'no time' is no reason"):
        steps_of("<!-- not run: no time -->\n```sh\nfalse\n```\n")


@pytest.mark.timeout(600)
def test_readme(directory: Path) -> None:
    assert execute((ROOT / "README.md").read_text("utf-8"), directory) == []
