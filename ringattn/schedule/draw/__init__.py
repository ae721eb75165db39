"""Draws schedules: as text for terminals, as SVG, and as PNG (which imports matplotlib when called)."""

from ringattn.schedule.draw.png import draw_png
from ringattn.schedule.draw.svg import draw_svg
from ringattn.schedule.draw.text import draw_text
from ringattn.schedule.draw.timeline import Timeline, timeline

__all__ = ["Timeline", "draw_png", "draw_svg", "draw_text", "timeline"]
