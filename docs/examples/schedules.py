"""Makes a schedule, prints it, proves it, and prices it on paper: python docs/examples/schedules.py

One process, no ranks: a schedule is plain data, and everything here works on a machine without torch.
"""

import ringattn
from ringattn.planner import PRESETS, price
from ringattn.schedule import check, token_ring
from ringattn.schedule.draw import draw_text

schedule = token_ring(4)
print(schedule)  # each step: the tiles that every rank computes | what departs, from which rank to which, and when it arrives
print(draw_text([schedule]))
check(schedule)  # every tile once, everything where it is needed in time, every result at its owner; else ScheduleError

for name in ("ring", "token_ring", "mesh"):
    plan = ringattn.make_plan(65536, world=4, heads=32, head_dim=128, dtype="bfloat16", schedule=name, topology="nvlink")
    costs = [price(plan, PRESETS["nvlink"], backward=backward) for backward in (False, True)]
    print(f"{name}: predicted {costs[0].seconds * 1e3:.2f} ms forward, {costs[1].seconds * 1e3:.2f} ms backward")
