"""The command line: one verb per file. torch is imported when a verb runs, not for `--help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from statewright import __version__
from statewright.cli.bench import bench
from statewright.cli.capacity import capacity
from statewright.cli.check import check
from statewright.cli.common import Verbs
from statewright.cli.convert import convert
from statewright.cli.data import data
from statewright.cli.demo import demo
from statewright.cli.diagnose import diagnose
from statewright.cli.evaluate import eval_
from statewright.cli.generate import generate
from statewright.cli.listing import list_
from statewright.cli.lm_eval import lm_eval
from statewright.cli.models import models
from statewright.cli.quickstart import quickstart
from statewright.cli.repair import repair
from statewright.cli.report import report, trace
from statewright.cli.resize import resize
from statewright.cli.size import size
from statewright.cli.state import state
from statewright.cli.study import study
from statewright.cli.train import train

VERBS = {
    "Start": (quickstart, demo, list_, models),
    "Build and train": (data, train, resize, convert),
    "Write, and carry a state on": (generate, state),
    "Examine and repair": (check, size, diagnose, repair, trace),
    "Measure and show": (eval_, lm_eval, bench, report),
    "Repeat the papers": (study, capacity),
}


@click.group(
    cls=Verbs,
    sections={title: tuple(verb.name for verb in verbs) for title, verbs in VERBS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    epilog="statewright VERB --help says more. Shell completion: see docs/completion.md.",
)
@click.version_option(__version__, prog_name="statewright")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Build, train, check, save and measure the state of any causal sequence model.

    \b
    Example: statewright quickstart
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for verbs in VERBS.values():
    for verb in verbs:
        cli.add_command(verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. A user's mistake is one line on stderr."""
    # Before torch is loaded: threads that wait for another spin for some 30 us, not for
    # milliseconds, during which they would keep the core from it if the machine is busy.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        code = cli.main(argv, prog_name="statewright", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort:
        return _fail("interrupted", 130)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see '{error.ctx.command_path} --help')"
        return _fail(f"{error.format_message()}{hint}", error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, OSError) as error:
        return _fail(_one_line(error), 1)
    except Exception as error:
        # What safetensors raises for a full disk or a broken file is not an OSError.
        if type(error).__name__ != "SafetensorError":
            raise
        return _fail(_one_line(error), 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> int:
    click.echo(f"statewright: {message}", err=True)
    return code
