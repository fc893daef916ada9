"""The trail of positions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "positions",
        sa.Column("order_id", sa.Uuid(), nullable=False),
        sa.Column("assignment", sa.Integer(), nullable=False),
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("ts", sa.Double(), nullable=False),
        sa.Column("lat", sa.Double(), nullable=False),
        sa.Column("lng", sa.Double(), nullable=False),
        sa.Column("accuracy", sa.Double()),
        sa.Column("heading", sa.Double()),
        sa.Column("speed", sa.Double()),
        sa.Column("recorded_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("order_id", "assignment", "slot", name=op.f("pk_positions")),
    )
    op.create_index("ix_positions_recorded_at", "positions", ["recorded_at"])
