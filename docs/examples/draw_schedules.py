"""Draws the schedules that the concepts page shows: python docs/examples/draw_schedules.py [FOLDER]

Writes one SVG for each, on four ranks, into docs/images or the folder given. No ranks, no torch.
"""

import sys
from pathlib import Path

from ringattn.schedule import mesh, ring, token_ring, ulysses
from ringattn.schedule.draw import draw_svg

SCHEDULES = {
    "ring": [ring(4)],
    "token_ring": [token_ring(4)],
    "mesh": [mesh(4)],
    "ulysses": ulysses(ring(1), 4),
}

folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "images")
for name, schedules in SCHEDULES.items():
    (folder / f"{name}.svg").write_text(draw_svg(schedules))
    print(f"{folder.name}/{name}.svg")
