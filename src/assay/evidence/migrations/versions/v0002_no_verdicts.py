"""Records of schema 2, and no verdict beside them: it is computed when records are read.

Old records come in without hashes of their code, so they are stale. Nothing is dropped but the verdict they were given.
"""

import json

import sqlalchemy as sa
from alembic import op

from assay.evidence.record import Evidence, upgraded

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring records of version 1 to version 2 and drop the stored verdicts: they are computed when records are read."""
    connection = op.get_bind()
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        triggers = connection.execute(
            sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'assay_evidence'")
        ).all()
        for trigger in triggers:
            op.execute(f"DROP TRIGGER {trigger.name}")
    else:
        op.execute("ALTER TABLE assay_evidence DISABLE TRIGGER assay_evidence_append_only")
    for row in connection.execute(sa.text("SELECT seq, record FROM assay_evidence ORDER BY seq")).all():
        old = json.loads(row.record)
        if old.get("schema_version", 1) != 1:
            continue
        new = Evidence.model_validate_json(json.dumps(upgraded(old)))
        connection.execute(
            sa.text("UPDATE assay_evidence SET id = :id, record = :record WHERE seq = :seq"),
            {"id": new.id, "record": new.to_json(), "seq": row.seq},
        )
    op.drop_column("assay_evidence", "verdict")
    if sqlite:
        for trigger in triggers:
            op.execute(trigger.sql)
    else:
        op.execute("ALTER TABLE assay_evidence ENABLE TRIGGER assay_evidence_append_only")


def downgrade() -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError("evidence is append-only: there is no way back")
