# The demo, run by bash on both nodes. Node 0 tells what happens; its output is what the newcomer sees.
