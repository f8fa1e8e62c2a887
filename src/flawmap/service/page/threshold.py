"""Threshold: what it rejects, seen while it is dragged; kept as a new version."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from urllib.parse import quote

from nicegui import ui

from flawmap.errors import FlawmapError
from flawmap.service.hosting import Host
from flawmap.service.page.access import allowed, may
from flawmap.service.page.components import ThresholdChart, when
from flawmap.service.records import Filter
from flawmap.service.service import Service

_LAST = (50, 200, 1000)


def build(service: Service, model: str | None, last: int) -> None:
    """The section for a model, over its last inspections."""
    if not service.hosts.by_name:
        ui.label("No model is served yet.").classes("panel")
        return
    host = service.hosts.by_name.get(model or "") or next(iter(service.hosts.by_name.values()))
    last = last if last in _LAST else 200
    serving = host.serving
    judge = serving.inspector.judge
    assert judge.threshold is not None
    rows = service.records.latest(Filter(model=host.name), last)
    administers = may(service, "administer")
    with ui.element("div").classes("stack"):
        with ui.element("section").classes("panel").props('aria-label="Threshold"'):
            with ui.element("div").classes("choices"):
                choose_model(service, host.name, f"/threshold?last={last}&model=")
                ui.select(
                    {count: f"last {count} inspected" for count in _LAST},
                    value=last,
                    label="Held against",
                    on_change=lambda event: ui.navigate.to(
                        f"/threshold?model={quote(host.name)}&last={int(event.value)}"
                    ),
                )
            if judge.calibration is None:
                ui.label("This model keeps no scores of good images: train it anew.")
                return

            async def save(value: float) -> None:
                await _keep(service, host, chart, versions.refresh, value=value)

            scores = [float(score) for score in judge.calibration.scores]
            chart = ThresholdChart(scores, rows, judge.threshold.value, may_save=administers, on_save=save)
            ui.label(judge.describe()).classes("quiet")
        with ui.element("div").classes("columns"):
            with ui.element("section").classes("panel").props('aria-label="Versions"'):
                with ui.element("h2"):
                    ui.label("Versions")
                versions = ui.refreshable(_versions)
                versions(service, host)
            if administers:
                with ui.element("section").classes("panel").props('aria-label="By rate"'):
                    with ui.element("h2"):
                        ui.label("By false-reject rate")
                    ui.label(
                        "A rate is kept when the model is trained anew, and is promised or estimated as its "
                        "calibration allows. A value holds for this model alone."
                    ).classes("quiet")
                    rate = ui.number("Of good parts rejected, in %", value=100 * judge.max_false_reject, min=0, max=100)

                    async def save_rate() -> None:
                        share = None if rate.value is None else float(rate.value) / 100
                        await _keep(service, host, chart, versions.refresh, rate=share)

                    ui.button("Save the threshold that keeps it", on_click=save_rate).props("unelevated no-caps")


def choose_model(service: Service, chosen: str, address: str) -> None:
    """One of the models, by an address that its name is added to."""
    ui.select(
        list(service.hosts.by_name),
        value=chosen,
        label="Model",
        on_change=lambda event: ui.navigate.to(address + quote(str(event.value))),
    )


async def _keep(
    service: Service,
    host: Host,
    chart: ThresholdChart,
    kept: Callable[[], object],
    *,
    value: float | None = None,
    rate: float | None = None,
) -> None:
    who = allowed(service, "administer")
    if who is None:
        return
    try:
        serving = await asyncio.to_thread(host.set_threshold, rate=rate, value=value, by=who.name)
    except FlawmapError as error:
        ui.notify(str(error), type="negative")
        return
    assert serving.inspector.judge.threshold is not None
    chart.settle(serving.inspector.judge.threshold.value)
    kept()
    ui.notify(f"version {serving.version} is in use", type="positive")


def _versions(service: Service, host: Host) -> None:
    rows = [
        (
            f"{row.version}",
            f"{row.value:.5g}",
            "by value" if row.rate is None else f"{100 * row.rate:.4g} %",
            when(row.at),
            row.by or "\N{EN DASH}",
        )
        for row in reversed(service.records.thresholds(host.name))
    ]
    trained = host.trained_threshold
    table(
        ("Version", "Threshold", "False rejects", "Since", "By"),
        [*rows, ("0", f"{trained.value:.5g}", f"{100 * (trained.requested or 0):.4g} %", "training", "\N{EN DASH}")],
    )


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], label: str | None = None) -> None:
    """A plain table: all of it is text."""
    with (
        ui.element("div").classes("grid").props('tabindex="0" role="region"').props(f'aria-label="{label or head[0]}"'),
        ui.element("table"),
    ):
        with ui.element("thead"), ui.element("tr"):
            for name in head:
                with ui.element("th").props('scope="col"'):
                    ui.label(name)
        with ui.element("tbody"):
            for row in rows:
                with ui.element("tr"):
                    for value in row:
                        with ui.element("td"):
                            ui.label(value)
