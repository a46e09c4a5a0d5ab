//! Rules of the cores: claims, returns, first errors and echoes, holds, the stall watch, cancel.

use super::{Edit, Mutant, Suite};

const UNIT: Suite = Suite::unit("moonrail-datapath");
const CORE: Suite = Suite::of("moonrail-datapath", "core");
const STALL: Suite = Suite::of("moonrail-datapath", "stall");
const CANCEL: Suite = Suite::of("moonrail-datapath", "cancel");
const LOST: Suite = Suite::of("moonrail-datapath", "lost");
const STRIPING: Suite = Suite::of("moonrail-datapath", "striping");
const REFUSALS: Suite = Suite::of("moonrail-datapath", "refusals");

const WORK: &str = "datapath/src/work.rs";
const QUIESCENCE: &str = "datapath/src/work/quiescence.rs";
const FAULT: &str = "datapath/src/core/fault.rs";
const INTAKE: &str = "datapath/src/core/intake.rs";
const POST: &str = "datapath/src/core/post.rs";
const REAP: &str = "datapath/src/core/reap.rs";
const STALLS: &str = "datapath/src/core/stall.rs";
const WATCH: &str = "datapath/src/core/watch.rs";

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "replaced-while-read",
        without: "whoever replaces a snapshot waits until its readers have left",
        edits: &[Edit {
            file: "datapath/src/lanes.rs",
            from: "self.readers.have_left(self.lanes.as_ref())",
            to: "self.readers.have_left(self.lanes.as_ref()) || !self.old.is_null()",
        }],
        catcher: UNIT.test("lanes::tests::what_a_reader_has_is_not_freed"),
    },
    Mutant {
        name: "a-lost-core-is-led",
        without: "no caller turns a core that has panicked",
        edits: &[Edit {
            file: "datapath/src/core/rest.rs",
            from: "!self.stopped && !self.panicked && self.trust == super::lost::Trust::Whole",
            to: "!self.stopped && !self.panicked",
        }],
        catcher: LOST.test("a_panic_on_the_thread_of_a_caller_that_leads_is_the_cores_and_not_the_callers"),
    },
    Mutant {
        name: "busy-core-is-led",
        without: "a core in busy mode never rests",
        edits: &[Edit {
            file: "datapath/src/core/run.rs",
            from: "let PollMode::Adaptive { spin } = mode else {",
            to: "let PollMode::Adaptive { spin } = PollMode::default() else {",
        }],
        catcher: Suite::of("moonrail", "leading")
            .test("one_caller_turns_an_idle_core_and_none_turns_a_busy_polling_one"),
    },
    Mutant {
        name: "claim-in-two-steps",
        without: "the next run of slices is claimed by one atomic add",
        edits: &[Edit {
            file: WORK,
            from: "let from = self.claimed.fetch_add(u64::from(most), Ordering::SeqCst);",
            to: "let from = self.claimed.load(Ordering::SeqCst);\n        std::thread::yield_now();\n        \
                 self.claimed.store(from + u64::from(most), Ordering::SeqCst);",
        }],
        catcher: UNIT.test("work::tests::every_slice_is_claimed_once_by_racing_cores"),
    },
    Mutant {
        name: "close-takes-nothing",
        without: "cancel and deadline end what was never claimed",
        edits: &[Edit {
            file: WORK,
            from: "if was >= total { 0..0 } else { was as u32..total as u32 }",
            to: "if was >= total { 0..0 } else { total as u32..total as u32 }",
        }],
        catcher: UNIT.test("work::tests::closing_takes_exactly_what_was_not_claimed"),
    },
    Mutant {
        name: "returned-slice-is-kept",
        without: "whoever clears a bit of the return map owns the slice",
        edits: &[Edit {
            file: WORK,
            from: "let was = word.fetch_and(!(1 << bit), Ordering::AcqRel);",
            to: "let was = word.load(Ordering::Acquire);",
        }],
        catcher: UNIT.test("work::tests::a_returned_slice_goes_to_one_taker"),
    },
    Mutant {
        name: "retries-without-limit",
        without: "a slice is retried as often as configured",
        edits: &[Edit {
            file: WORK,
            from: "failures <= self.retries && tries.posts",
            to: "failures < u8::MAX && tries.posts",
        }],
        catcher: UNIT.test("work::tests::a_slice_is_retried_as_often_as_configured_and_no_more"),
    },
    Mutant {
        name: "hold-does-not-count",
        without: "a Work that is held for a fence is not terminal",
        edits: &[Edit {
            file: WORK,
            from: "self.note_held();\n        self.remaining.fetch_add(1, Ordering::Relaxed);",
            to: "self.note_held();",
        }],
        catcher: UNIT.test("work::tests::the_last_settle_ends_the_batch_and_outcomes_tell"),
    },
    Mutant {
        name: "closed-is-not-quarantined",
        without: "a batch whose end was asked for and that is not over is in quarantine",
        edits: &[Edit {
            file: QUIESCENCE,
            from: "if self.is_closed() || held && accounted()",
            to: "if held && accounted()",
        }],
        catcher: UNIT
            .test("work::quiescence::tests::what_is_claimed_when_it_is_cancelled_is_in_quarantine_until_it_ends"),
    },
    Mutant {
        name: "fence-forgotten-in-the-proof",
        without: "what was held for a fence says that the fence proved it",
        edits: &[Edit { file: QUIESCENCE, from: "self.facts.fetch_or(HELD, Ordering::Relaxed);", to: "" }],
        catcher: UNIT.test("work::quiescence::tests::all_bytes_in_place_and_a_hold_is_quarantine_too"),
    },
    Mutant {
        name: "no-fence",
        without: "a WRITE that was outstanding at a failure holds its Work until the peer's end is fenced",
        edits: &[Edit {
            file: FAULT,
            from: "if !self.qps[slot].post.as_ref().is_some_and(|post| post.drains_clean()) {",
            to: "if false {",
        }],
        catcher: CORE.test("a_work_whose_write_was_outstanding_at_a_failure_waits_for_the_fence"),
    },
    Mutant {
        name: "every-echo-is-a-first-error",
        without: "the first failed completion is the cause, what follows are echoes",
        edits: &[Edit {
            file: FAULT,
            from: "if first {\n            self.fail_rail(rail, error, now);",
            to: "if first || error.status == WcStatus::WR_FLUSH_ERR {\n            self.fail_rail(rail, error, now);",
        }],
        catcher: CORE.test("what_a_dead_port_flushes_is_carried_by_the_other_rail_and_costs_no_error"),
    },
    Mutant {
        name: "echo-costs-a-retry",
        without: "a flushed slice costs no retry",
        edits: &[Edit {
            file: FAULT,
            from: "own.filter(|(status, _)| classify(*status) != FaultClass::Flush)",
            to: "own.or(Some((WcStatus::WR_FLUSH_ERR, 0)))",
        }],
        catcher: STALL.test("of_a_silent_queue_pair_only_the_oldest_request_is_charged"),
    },
    Mutant {
        name: "wrong-request-is-retried",
        without: "a request that is wrong fails its transfer, whatever rails there are",
        edits: &[Edit {
            file: FAULT,
            from: "if classify(status) == FaultClass::Request {",
            to: "if classify(status) == FaultClass::Flush {",
        }],
        catcher: CORE.test("a_wrong_key_fails_its_transfer_and_not_its_neighbours"),
    },
    Mutant {
        name: "rail-used-before-its-trial",
        without: "a rail is used only after its trial came back",
        edits: &[
            Edit {
                file: REAP,
                from: "fn trial_returned(&mut self, slot: usize) {",
                to: "pub(super) fn trial_returned(&mut self, slot: usize) {",
            },
            Edit {
                file: INTAKE,
                from: "self.post_trial(usize::from(slot), now);",
                to: "self.post_trial(usize::from(slot), now);\n        self.trial_returned(usize::from(slot));",
            },
        ],
        catcher: CORE.test("a_rail_that_carries_nothing_is_never_used"),
    },
    Mutant {
        name: "no-deadline",
        without: "the home core ends a Work at its deadline",
        edits: &[Edit {
            file: WATCH,
            from: "if entry.home && work.deadline() <= now && !work.is_closed() {",
            to: "if entry.home && work.deadline() == Nanos::ZERO && !work.is_closed() {",
        }],
        catcher: CORE.test("a_work_without_a_rail_asks_for_one_and_ends_with_the_cause_or_the_deadline"),
    },
    Mutant {
        name: "one-completion-one-request",
        without: "a completion ends every request before it on its queue pair",
        edits: &[Edit { file: REAP, from: "for nth in 0..ended {", to: "for nth in before..ended {" }],
        catcher: CORE.test("a_batch_of_128_small_transfers_rings_and_completes_rarely"),
    },
    Mutant {
        name: "completion-of-another-life",
        without: "a completion of a queue pair that is gone is nobody's",
        edits: &[Edit { file: REAP, from: ".filter(|qp| qp.generation == completion.wr_id.generation)", to: "" }],
        catcher: REFUSALS.test("a_late_completion_of_a_slots_former_queue_pair_is_nobodys"),
    },
    Mutant {
        name: "cut-reads-are-believed",
        without: "a READ counts as done only while the device stands by its queue pair, where devices are known to lie",
        edits: &[Edit { file: REAP, from: "let doubted = ", to: "let doubted = false && " }],
        catcher: CORE.test("a_read_that_its_device_does_not_stand_by_is_made_again"),
    },
    Mutant {
        name: "no-stall-watch",
        without: "a queue pair that falls silent is a first error",
        edits: &[Edit { file: WATCH, from: "self.watch_stalls(now);", to: "" }],
        catcher: STALL.test("a_trial_that_is_swallowed_ends_the_life_of_its_rail"),
    },
    Mutant {
        name: "held-up-trial-is-believed",
        without: "a trial that was held up lengthens nobody's patience",
        edits: &[Edit {
            file: STALLS,
            from: "STALL_ROUND_TRIPS, rail.credit.carried_round_trip())",
            to: "STALL_ROUND_TRIPS, rail.credit.round_trip())",
        }],
        catcher: STALL.test("a_rail_that_is_silent_after_a_trial_that_was_held_up_is_noticed_as_soon_as_any"),
    },
    Mutant {
        name: "stopped-core-hears-silence",
        without: "time in which the core did not turn is not silence",
        edits: &[Edit {
            file: STALLS,
            from: "now.since(self.last_watch).min(STALL_STEP)",
            to: "now.since(self.last_watch)",
        }],
        catcher: STALL.test("time_in_which_the_core_did_not_turn_is_not_silence"),
    },
    Mutant {
        name: "slow-is-silent",
        without: "a slow path has as many round trips of patience",
        edits: &[Edit {
            file: STALLS,
            from: "round_trip.unwrap_or(0).saturating_mul(round_trips)",
            to: "round_trip.unwrap_or(0).saturating_mul(round_trips).min(0)",
        }],
        catcher: STALL.test("slow_and_idle_rails_are_not_silent_ones"),
    },
    Mutant {
        name: "long-is-silent",
        without: "a long request on a slow path has more patience per byte",
        edits: &[Edit {
            file: STALLS,
            from: "Nanos(rail.credit.in_flight().saturating_mul(STALL_NANOS_PER_BYTE))",
            to: "Nanos(rail.credit.in_flight().saturating_mul(STALL_NANOS_PER_BYTE).min(0))",
        }],
        catcher: STALL.test("a_long_request_on_a_slow_path_is_not_silence"),
    },
    Mutant {
        name: "cancel-waits-for-the-stall-watch",
        without: "a silent queue pair that a cancelled batch waits for is given up early",
        edits: &[Edit { file: STALLS, from: "&& self.holds_closed_work(slot)", to: "&& false" }],
        catcher: CANCEL.test("on_a_dead_path_the_queue_pair_is_given_up_and_bystanders_move_at_no_cost"),
    },
    Mutant {
        name: "given-up-without-a-cancel",
        without: "a queue pair that nobody waits to be rid of has the stall watch's patience",
        edits: &[Edit { file: STALLS, from: "&& self.holds_closed_work(slot)", to: "" }],
        catcher: CANCEL.test("on_a_dead_path_the_queue_pair_is_given_up_and_bystanders_move_at_no_cost"),
    },
    Mutant {
        name: "posted-after-cancel",
        without: "what came back of a closed Work ends, and is not posted again",
        edits: &[Edit {
            file: POST,
            from: "if work.is_closed() {\n                    let error",
            to: "if work.is_terminal() {\n                    let error",
        }],
        catcher: REFUSALS.test("what_came_back_before_a_cancel_is_not_posted_after_it"),
    },
    Mutant {
        name: "full-queue-counts-as-posting",
        without: "a device without room costs a slice nothing",
        edits: &[Edit { file: POST, from: "work.uncount_post(entry.slice);", to: "let _ = work;" }],
        catcher: REFUSALS.test("a_full_send_queue_costs_a_slice_nothing_however_long"),
    },
    Mutant {
        name: "silent-tail-is-trusted",
        without: "requests taken without a completion asked for fail the rail",
        edits: &[Edit { file: POST, from: " && !silent_tail", to: "" }],
        catcher: REFUSALS.test("a_silent_tail_fails_the_rail_and_what_was_refused_goes_back"),
    },
    Mutant {
        name: "posted-without-limit",
        without: "a slice is posted 16 times at the most, whatever sent it back",
        edits: &[Edit {
            file: POST,
            from: "if work.count_post(index) > POSTS_MAX {",
            to: "if work.count_post(index) == u8::MAX {",
        }],
        catcher: REFUSALS.test("a_slice_that_every_rail_flushes_ends_after_its_postings"),
    },
    Mutant {
        name: "drains-for-ever",
        without: "a queue pair that does not drain goes back to be destroyed",
        edits: &[Edit {
            file: WATCH,
            from: "} else if now.since(since) > DRAIN_LIMIT {",
            to: "} else if now.since(since) > Nanos::FAR {",
        }],
        catcher: UNIT.test("core::explored::queue_pairs_of_a_rail_live_and_end_in_every_order"),
    },
    Mutant {
        name: "given-back-before-the-hold",
        without: "a Work is held before the slice that it is held for is given back",
        edits: &[Edit {
            file: FAULT,
            from: "if !self.qps[slot].post.as_ref().is_some_and(|post| post.drains_clean()) {\n            \
                   self.hold_for_fence(slot, &entry);\n        }\n        self.return_entry(&entry, own, rail);",
            to: "self.return_entry(&entry, own, rail);\n        \
                 if !self.qps[slot].post.as_ref().is_some_and(|post| post.drains_clean()) {\n            \
                 self.hold_for_fence(slot, &entry);\n        }",
        }],
        catcher: UNIT.test("core::explored::queue_pairs_of_a_rail_live_and_end_in_every_order"),
    },
    Mutant {
        name: "destroyed-without-a-hold",
        without: "what a destroyed queue pair held may still land",
        edits: &[Edit {
            file: INTAKE,
            from: "            self.hold_for_fence(slot, &entry);\n            if entry.seat != TRIAL {",
            to: "            if entry.seat != TRIAL {",
        }],
        catcher: UNIT.test("core::explored::queue_pairs_of_a_rail_live_and_end_in_every_order"),
    },
    Mutant {
        name: "dead-queue-pair-revives",
        without: "a queue pair whose life is over stays out of use, whatever completes on it",
        edits: &[Edit {
            file: REAP,
            from: "if self.qps[slot].state != QpState::Trial {",
            to: "if self.qps[slot].state == QpState::Up {",
        }],
        catcher: UNIT.test("core::explored::queue_pairs_of_a_rail_live_and_end_in_every_order"),
    },
    Mutant {
        name: "rail-freed-while-held",
        without: "a life keeps its seat until the Works that are held for it are let go",
        edits: &[Edit {
            file: INTAKE,
            from: "entry.qp_count == 0 && entry.holds == NONE {",
            to: "entry.qp_count == 0 {",
        }],
        catcher: UNIT.test("core::explored::queue_pairs_of_a_rail_live_and_end_in_every_order"),
    },
    Mutant {
        name: "completion-room-is-not-counted",
        without: "no more requests are out on a completion queue than it has entries",
        edits: &[Edit {
            file: POST,
            from: "let requests = (queue.min(completions) as usize)",
            to: "let requests = (queue.min(completions | u32::MAX) as usize)",
        }],
        catcher: UNIT.test("core::explored::queue_pairs_of_a_rail_live_and_end_in_every_order"),
    },
    Mutant {
        name: "route-stays-open",
        without: "a core that has no rail left to a peer says so",
        edits: &[Edit { file: FAULT, from: "shared.set_route(self.id, false);", to: "let _ = shared;" }],
        catcher: UNIT.test("core::explored::rails_fail_and_come_back_in_every_order"),
    },
    Mutant {
        name: "lost-core-ends-nothing",
        without: "what a core that has panicked was the home of ends as core lost",
        edits: &[Edit { file: WATCH, from: "self.end_lost();", to: "" }],
        catcher: LOST.test("what_a_lost_core_carried_ends_soon_and_is_not_touched_any_more"),
    },
    Mutant {
        name: "lost-core-is-chosen",
        without: "nobody gives work to a core that has panicked while there is another",
        edits: &[Edit { file: WATCH, from: "if lost { u64::MAX } else", to: "if lost { 0 } else" }],
        catcher: LOST.test("without_a_rail_work_goes_to_a_core_that_can_wait_for_one"),
    },
    Mutant {
        name: "lost-core-keeps-its-nics",
        without: "control hears that a core that has panicked uses its NICs no more",
        edits: &[Edit { file: "datapath/src/core/lost.rs", from: "self.cq_lost(nic);", to: "let _ = nic;" }],
        catcher: LOST.test("what_a_lost_core_carried_ends_soon_and_is_not_touched_any_more"),
    },
    Mutant {
        name: "small-waits-for-credit",
        without: "where all rails are busy, what is small goes to the one that will be through first",
        edits: &[Edit { file: POST, from: "self.post_small(peer, now);", to: "0;" }],
        catcher: STRIPING.test("a_small_transfer_waits_for_what_is_posted_and_costs_the_bulk_nothing"),
    },
    Mutant {
        name: "lost-core-vouches",
        without: "a completion that comes after a panic does not vouch for the requests before it",
        edits: &[Edit { file: REAP, from: "let lost = self.trust != Trust::Whole;", to: "let lost = false;" }],
        catcher: REFUSALS.test("what_a_panic_lost_is_not_taken_for_done"),
    },
    Mutant {
        name: "a-part-is-the-whole",
        without: "slices of one transfer add up",
        edits: &[Edit { file: WORK, from: "if len == transfer.len {", to: "if len <= transfer.len {" }],
        catcher: UNIT.test("work::tests::a_transfer_is_done_with_its_last_slice_whether_it_has_one_or_more"),
    },
    Mutant {
        name: "nothing-flies",
        without: "the watch looks at every queue pair that has something in flight",
        edits: &[Edit { file: POST, from: "self.flying.insert(slot);", to: "self.flying.remove(slot);" }],
        catcher: STALL.test("a_silent_queue_pair_is_a_first_error_and_the_other_rail_carries_what_it_had"),
    },
    Mutant {
        name: "memory-takes-every-descriptor",
        without: "memory holds a quarter of the descriptors at the most",
        edits: &[Edit {
            file: "datapath/src/region/file.rs",
            from: "(taken < most).then_some(place)",
            to: "(taken < u64::MAX || most == 0).then_some(place)",
        }],
        catcher: Suite::of("moonrail-datapath", "descriptors")
            .test("small_regions_take_a_quarter_of_the_descriptors_and_the_rest_works_without"),
    },
    Mutant {
        name: "the-ring-fills-up-in-silence",
        without: "control is woken when half of the room for finished Works is taken",
        edits: &[Edit {
            file: "datapath/src/core/settle.rs",
            from: "if told >= ACTIVE_WORKS / 2 {",
            to: "if told > EVENT_RING {",
        }],
        catcher: CORE.test("control_is_woken_before_works_that_nobody_waits_for_have_filled_its_ring"),
    },
];
