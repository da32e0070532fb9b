"""The command line: each job is a function in a file of its own under `launch.jobs`."""

import sys
from typing import Annotated

try:
    import typer
except ImportError:  # a plain `pip install shardpage` is the library alone
    sys.exit("the shardpage command needs typer and rich: pip install 'shardpage[launch]'")

from .jobs import bench, doctor, generate, plan, render, schedule, simulate, verify
from .processes import guard
from .processes.doctor import installed

app = typer.Typer(
    name="shardpage",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        print("shardpage", installed()["shardpage"] or "(a source tree that is not installed)")
        raise typer.Exit()


@app.callback()
def shardpage(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Paged attention for whole TPU pods, from a laptop up."""


app.command()(generate.generate)
app.command()(plan.plan)
app.command()(schedule.schedule)
app.command()(bench.bench)
app.command()(verify.verify)
app.command()(doctor.doctor)
app.command()(render.render)
app.command(context_settings={"allow_interspersed_args": False})(simulate.simulate)


def main() -> None:
    """Runs the job that the command line names."""
    try:
        app()
    except SystemExit as exit:
        if exit.code and guard.is_installed():  # a plain exit would wait for the other processes
            guard.end(exit.code if isinstance(exit.code, int) else guard.FAILED)
        raise


if __name__ == "__main__":
    main()
