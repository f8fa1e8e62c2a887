"""Run by Alembic, on the connection that `flawmap.service.database.migrate` gives."""

from alembic import context

from flawmap.service.tables import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
