//! Options: what the builder sets, what the MC_* environment variables set, and what holds otherwise.
