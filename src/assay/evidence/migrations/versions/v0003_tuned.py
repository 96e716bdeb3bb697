"""The table of what runs of `assay tune` found, append-only like that of the records."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of runs, which can only grow."""
    op.create_table(
        "assay_tuned",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(32), nullable=False, unique=True),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("imported", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER assay_tuned_no_{action.lower()} BEFORE {action} ON assay_tuned "
                "BEGIN SELECT RAISE(ABORT, 'evidence is append-only'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER assay_tuned_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON assay_tuned "
            "FOR EACH STATEMENT EXECUTE FUNCTION assay_evidence_refuse()"
        )


def downgrade() -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError("evidence is append-only: there is no way back")
