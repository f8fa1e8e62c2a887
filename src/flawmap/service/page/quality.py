"""Quality: what operators say against the verdicts, and whether parts and pictures drift."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from urllib.parse import quote

from nicegui import ui

from flawmap.service.database import now
from flawmap.service.page.components import picture_address, when
from flawmap.service.page.threshold import choose_model, table
from flawmap.service.quality import (
    Drift,
    Rate,
    agreement,
    capture_drift,
    day_of,
    disagreements,
    grouped,
    score_drift,
)
from flawmap.service.records import Filter
from flawmap.service.service import Service
from flawmap.service.tables import InspectionRow
from flawmap.text import cell, counted

_DAYS = (7, 30, 365)
_DAY = 24 * 3600 * 1000
_RECENT = 300  # inspections that drift is looked for in
_SURE = 0.01  # p-value from which on a drift is called one


def build(service: Service, model: str | None, days: int) -> None:
    """The section, over so many days back; drift and disagreements of one model."""
    days = days if days in _DAYS else 30
    worded = _worded(service, days)
    with ui.element("div").classes("stack"):
        with ui.element("section").classes("panel").props('aria-label="Escape and overkill"'):
            with ui.element("div").classes("row"):
                with ui.element("h2"):
                    ui.label("Escape and overkill")
                with ui.element("div").classes("choices"):
                    ui.select(
                        {count: f"last {count} days" for count in _DAYS},
                        value=days,
                        label="Over",
                        on_change=lambda event: ui.navigate.to(
                            f"/quality?days={int(event.value)}&model={quote(model or '')}"
                        ),
                    )
                    ui.link("Download CSV", f"/page-files/quality.csv?days={days}").classes("link")
            total = agreement(worded)
            with ui.element("div").classes("figures"):
                _figure("of parts called defect were judged good (escape)", total.escape)
                _figure("of parts called good were judged defect (overkill)", total.overkill)
            ui.label(
                f"From {counted(len(worded), 'inspection')} with an operator's word, {total.unsure} of them unsure. "
                "The rates hold for what operators looked at, which may be what was hard to judge."
            ).classes("quiet")
            head = ("Day", "Model", "Words", "Escape", "95 % interval", "Overkill", "95 % interval")
            table(head, [_line(key, rows) for key, rows in reversed(list(_by_day_and_model(worded).items()))])
        if service.hosts.by_name:
            _of_model(service, model, days, worded)


def _of_model(service: Service, model: str | None, days: int, worded: list[InspectionRow]) -> None:
    host = service.hosts.by_name.get(model or "") or next(iter(service.hosts.by_name.values()))
    judge = host.serving.inspector.judge
    digest = host.serving.inspector.digest or ""
    recent = [row for row in service.records.latest(Filter(model=host.name), _RECENT) if row.model_digest == digest]
    with ui.element("section").classes("panel").props('aria-label="Drift"'):
        with ui.element("div").classes("row"):
            with ui.element("h2"):
                ui.label("Drift")
            choose_model(service, host.name, f"/quality?days={days}&model=")
        if judge.calibration is not None and judge.threshold is not None:
            _tell([score_drift(judge.calibration.scores, recent, judge.threshold.value)], "at calibration")
        first = _first(service, host.name, _RECENT)
        if first and len([row for row in recent if row.id > first[-1].id]) < len(first):  # few yet: half against half
            first = first[: len(recent) // 2]
        _tell(capture_drift(first, [row for row in recent if first and row.id > first[-1].id]), "first seen")
        ui.label(
            f"Two-sample Kolmogorov-Smirnov tests over the last {_RECENT} inspections; p-values of the capture "
            f"statistics are corrected for their number (Holm). Below {_SURE:g} it is called a drift."
        ).classes("quiet")
    with ui.element("section").classes("panel").props('aria-label="Disagreements"'):
        with ui.element("h2"):
            ui.label("Worst disagreements")
        found = disagreements(row for row in worded if row.model == host.name)
        if not found:
            ui.label("No operator's word is against a verdict.").classes("quiet")
        with ui.element("ul").classes("rejected"):
            for row in found:
                with ui.element("li"), ui.link(target=f"/?inspection={row.id}").classes(f"is-{row.verdict}"):
                    if address := picture_address(row, "thumb"):
                        ui.element("img").props["src"] = address
                    else:
                        ui.element("span").classes("no-thumb")
                    ui.label(row.name).classes("cut")
                    ui.label(f"judged {row.verdict}, said {row.word}")
                    ui.label(f"{row.score:.4g} against {row.threshold:.4g}").classes("quiet")
                    ui.label(when(row.at)).classes("quiet")


def csv_of(service: Service, days: int) -> str:
    """The rates of each day and model."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rates = [f"{name}{part}" for name in ("escape", "overkill") for part in ("s", "_cases", "_low", "_high")]
    writer.writerow(["day", "model", *rates, "unsure"])
    for (day, model), rows in _by_day_and_model(_worded(service, days)).items():
        found = agreement(rows)
        values: list[object] = []
        for rate in (found.escape, found.overkill):
            values += [rate.events, rate.cases, *(f"{side:.6f}" for side in rate.interval)]
        writer.writerow([day, cell(model), *values, found.unsure])
    return out.getvalue()


def _worded(service: Service, days: int) -> list[InspectionRow]:
    return list(service.records.each(Filter(worded=True, since=now() - days * _DAY)))


def _first(service: Service, model: str, count: int) -> list[InspectionRow]:
    found = []
    for row in service.records.each(Filter(model=model), block=count):
        found.append(row)
        if len(found) == count:
            break
    return found


def _by_day_and_model(rows: Iterable[InspectionRow]) -> dict[tuple[str, ...], list[InspectionRow]]:
    return grouped(rows, lambda row: (day_of(row), row.model))


def _line(key: tuple[str, ...], rows: list[InspectionRow]) -> tuple[str, ...]:
    found = agreement(rows)
    return (*key, str(len(rows)), *_told(found.escape), *_told(found.overkill))


def _told(rate: Rate) -> tuple[str, str]:
    if rate.share is None:
        return "\N{EN DASH}", "\N{EN DASH}"
    low, high = rate.interval
    return f"{rate.share:.1%} ({rate.events} of {rate.cases})", f"{low:.1%} to {high:.1%}"


def _figure(told: str, rate: Rate) -> None:
    share, interval = _told(rate)
    with ui.element("div").classes("figure"):
        with ui.element("b"):
            ui.label(share.split(" ")[0])
        ui.label(
            f"{told}: {rate.events} of {rate.cases}, 95 % interval {interval}"
            if rate.cases
            else f"{told}: no words yet"
        ).classes("quiet")


def _tell(drifts: list[Drift], before: str) -> None:
    rows = []
    for one in drifts:
        if one.p_value is None:
            verdict = "too few to say"
        elif one.p_value < _SURE:
            verdict = f"drifts (p = {one.p_value:.2g})"
        else:
            verdict = f"no sign of it (p = {one.p_value:.2g})"
        counts = f"{one.counts[0]} and {one.counts[1]}"
        rows.append((one.name, verdict, _number(one.before), _number(one.now), counts))
    table(("What", "Drift", f"Median {before}", "Median now", "Compared"), rows, f"Drift from what was {before}")


def _number(value: float) -> str:
    return "\N{EN DASH}" if value != value else f"{value:.4g}"
