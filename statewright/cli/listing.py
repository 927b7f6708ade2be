"""`statewright list`: what can be named in a spec, with its options."""

from __future__ import annotations

import click


@click.command("list")
def list_() -> None:
    """List mixers, policies, tasks and scan backends, with the options a spec may set."""
    from rich.console import Console
    from rich.table import Table

    from statewright.hf.pretrained import PRETRAINED
    from statewright.mixers import MIXERS
    from statewright.ops import VECTOR_BACKENDS
    from statewright.policies import POLICIES
    from statewright.spec import options_of
    from statewright.tasks import TASKS

    console = Console()
    for title, registry in (("mixers", MIXERS), ("policies", POLICIES), ("tasks", TASKS)):
        table = Table(title=f"{title}  (name:option=value:option=value)", title_justify="left")
        table.add_column("name", style="bold")
        table.add_column("options and defaults")
        table.add_column("what it is")
        for name, entry in registry.items():
            options = ", ".join(f"{n}={p.default}" for n, p in options_of(entry).items())
            table.add_row(name, options, (entry.__doc__ or "").splitlines()[0])
        console.print(table)
    console.print(f"[bold]scan backends[/bold]  {', '.join(VECTOR_BACKENDS)}")
    console.print("[bold]tokenizers[/bold]     bytes, characters, any Hugging Face path or id")
    carried = ", ".join(PRETRAINED)
    console.print(f"[bold]models[/bold]         any directory or Hugging Face id, {carried}")
