"""Alembic's entry: run the migrations on the connection that `server.migrate` hands over."""

from __future__ import annotations

from alembic import context

from models import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
