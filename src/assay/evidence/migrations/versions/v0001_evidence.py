"""The evidence table, and the triggers that keep it append-only."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of records, which can only grow."""
    op.create_table(
        "assay_evidence",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(32), nullable=False, unique=True),
        sa.Column("claim", sa.Text(), nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("scale", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("record", sa.Text(), nullable=False),
    )
    op.create_index("assay_evidence_slug", "assay_evidence", ["slug"])
    op.create_index("assay_evidence_claim", "assay_evidence", ["claim"])
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER assay_evidence_no_{action.lower()} BEFORE {action} ON assay_evidence "
                "BEGIN SELECT RAISE(ABORT, 'evidence is append-only'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION assay_evidence_refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'evidence is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER assay_evidence_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON assay_evidence "
            "FOR EACH STATEMENT EXECUTE FUNCTION assay_evidence_refuse()"
        )


def downgrade() -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError("evidence is append-only: there is no way back")
