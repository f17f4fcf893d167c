"""``cache``: what was fetched from URLs and is kept on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vlora.tools.common_options import Timeout
from vllm_vlora.tools.terminal import AsJson, Verbose, print_result, reported

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_vlora.downloads import CacheEntry


def cache(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="URL", help="Only what is kept of these.", show_default=False),
    ] = None,
    clean: Annotated[bool, typer.Option("--clean", help="Remove all of it.")] = False,
    clean_old: Annotated[
        bool,
        typer.Option(
            "--clean-old",
            help="Remove what is not complete, and all states but the newest of each URL.",
        ),
    ] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show or remove what was fetched from URLs (s3://, gs://, https://, ...).

    The cache is VLLM_VLORA_CACHE, or vllm-vlora in XDG_CACHE_HOME or
    ~/.cache. It grows until it is cleaned. What comes from the Hub is in the
    Hub's own cache (`hf cache`). A server that was started from a state that
    is removed keeps the tasks that it has loaded, and finds no others.

    Examples:
        vllm-vlora cache
        vllm-vlora cache s3://bucket/my-tasks --clean-old
    """
    if clean and clean_old:
        raise typer.BadParameter("is more than --clean-old; give one", param_hint="--clean")
    with reported(verbose, timeout):
        from vllm_vlora import downloads

        chosen = _chosen(downloads.cache_entries(), urls)
        cleaned, freed = clean or clean_old, 0
        if cleaned:
            freed = sum(downloads.clean(entry, keep_newest=clean_old) for entry in chosen)
        data = {
            "cache": str(downloads.cache_folder()),
            "freed": freed,
            "entries": [
                {
                    "url": entry.url,
                    "folder": str(entry.folder),
                    "states": entry.states,
                    "bytes": entry.nbytes,
                    "age_seconds": round(entry.age),
                }
                for entry in _chosen(downloads.cache_entries(), urls, must=not clean)
            ],
        }
        print_result(
            data, lambda console, found: _print_cache(console, found, cleaned=cleaned), as_json
        )


def _chosen(
    entries: list[CacheEntry], urls: list[str] | None, *, must: bool = True
) -> list[CacheEntry]:
    """The entries of these URLs, or all.

    Raises:
        OptionError: the cache has nothing of one of them, though it must.
    """
    from vllm_vlora.downloads import Cached
    from vllm_vlora.errors import OptionError

    if not urls:
        return entries
    folders = {Cached(url).folder: url for url in urls}
    missing = set(folders) - {entry.folder for entry in entries}
    if missing and must:
        raise OptionError(
            f"the cache has nothing of {folders[missing.pop()]}; `vllm-vlora cache` shows what it has"
        )
    return [entry for entry in entries if entry.folder in folders]


def _print_cache(console: Console, data: dict[str, Any], *, cleaned: bool) -> None:
    from vllm_vlora.checkpoint.card import format_bytes
    from vllm_vlora.tools.summary import line, make_table

    if data["entries"]:
        table = make_table(["URL"], ["States", "Size", "Looked at"])
        for entry in data["entries"]:
            days = entry["age_seconds"] / 86400
            size = format_bytes(entry["bytes"])
            table.add_row(entry["url"], str(entry["states"]), size, f"{days:.1f} days ago")
        console.print(table)
    total = sum(entry["bytes"] for entry in data["entries"])
    freed = f", {format_bytes(data['freed'])} freed" if cleaned else ""
    line(console, f"{data['cache']}: {format_bytes(total) if total else 'empty'}{freed}")
