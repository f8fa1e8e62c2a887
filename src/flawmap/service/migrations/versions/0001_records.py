"""The tables of version 1.

Written out, and not taken from `flawmap.service.tables`, which later versions change.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _number() -> sa.Column[int]:
    return sa.Column("id", _NUMBER, primary_key=True)


def upgrade() -> None:
    op.create_table(
        "requests",
        _number(),
        sa.Column("owner", sa.String(100), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("owner", "key"),
    )
    op.create_table(
        "inspections",
        _number(),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("model", sa.String(100), nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("threshold_version", sa.Integer, nullable=False),
        sa.Column("source", sa.String(200), nullable=False),
        sa.Column("name", sa.String(300), nullable=False),
        sa.Column("owner", sa.String(100), nullable=False),
        sa.Column("request", _NUMBER, sa.ForeignKey("requests.id"), nullable=True),
        sa.Column("image_digest", sa.String(64), nullable=False),
        sa.Column("width", sa.Integer, nullable=True),
        sa.Column("height", sa.Integer, nullable=True),
        sa.Column("verdict", sa.String(10), nullable=False),
        sa.Column("score", sa.Float(53), nullable=True),
        sa.Column("p_value", sa.Float(53), nullable=True),
        sa.Column("threshold", sa.Float(53), nullable=True),
        sa.Column("regions", sa.JSON, nullable=False),
        sa.Column("error", sa.Text, nullable=True),
        sa.Column("milliseconds", sa.Float(53), nullable=False),
        sa.Column("statistics", sa.JSON, nullable=True),
        sa.Column("picture", sa.String(80), nullable=True),
        sa.Column("map", sa.String(80), nullable=True),
        sa.Column("stored", sa.BigInteger, nullable=False),
        sa.Column("word", sa.String(10), nullable=True),
        sa.Column("word_by", sa.String(100), nullable=True),
        sa.Column("word_at", sa.BigInteger, nullable=True),
    )
    for name, columns in (
        ("inspections_by_model", ["model", "id"]),
        ("inspections_by_verdict", ["verdict", "id"]),
        ("inspections_by_time", ["at"]),
        ("inspections_by_picture", ["picture"]),
        ("inspections_by_map", ["map"]),
        ("ix_inspections_request", ["request"]),
    ):
        op.create_index(name, "inspections", columns)
    op.create_table(
        "words",
        _number(),
        sa.Column("inspection", _NUMBER, sa.ForeignKey("inspections.id"), nullable=False, index=True),
        sa.Column("word", sa.String(10), nullable=False),
        sa.Column("by", sa.String(100), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "thresholds",
        _number(),
        sa.Column("model", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("rate", sa.Float(53), nullable=True),
        sa.Column("value", sa.Float(53), nullable=False),
        sa.Column("by", sa.String(100), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("model", "version"),
    )
    op.create_table(
        "seen",
        _number(),
        sa.Column("source", sa.String(500), nullable=False),
        sa.Column("name", sa.String(500), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.Column("inspection", _NUMBER, sa.ForeignKey("inspections.id"), nullable=True),
        sa.UniqueConstraint("source", "name", "size", "changed"),
    )
    op.create_table(
        "deliveries",
        _number(),
        sa.Column("inspection", _NUMBER, sa.ForeignKey("inspections.id"), nullable=False),
        sa.Column("url", sa.String(1000), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("due", sa.BigInteger, nullable=False),
        sa.Column("error", sa.Text, nullable=True),
    )
    op.create_index("deliveries_due", "deliveries", ["state", "due"])
    op.create_table(
        "jobs",
        _number(),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("by", sa.String(100), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("data", sa.String(1000), nullable=False),
        sa.Column("folder", sa.String(1000), nullable=False),
        sa.Column("command", sa.JSON, nullable=False),
        sa.Column("process", sa.Integer, nullable=True),
        sa.Column("message", sa.Text, nullable=True),
    )


def downgrade() -> None:
    for name in ("jobs", "deliveries", "seen", "thresholds", "words", "inspections", "requests"):
        op.drop_table(name)
