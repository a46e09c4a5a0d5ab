//! Rules of the control thread: fence, incarnations, handshakes, back-off, repair, the node's keys, what is logged.

use super::{Edit, Mutant, Suite};

const UNIT: Suite = Suite::unit("moonrail-control");
const BRAINS: Suite = Suite::of("moonrail-control", "brains");
const FABRICS: Suite = Suite::of("moonrail-control", "fabrics");
const SIMULATION: Suite = Suite::of("moonrail-control", "simulation");

const CONNECT: &str = "control/src/connect.rs";
const RESPONDER: &str = "control/src/handshake/responder.rs";
const INITIATOR: &str = "control/src/handshake/initiator.rs";
const REPAIR: &str = "control/src/repair.rs";
const FENCE: &str = "control/src/brain/fence.rs";
const INCIDENT: &str = "control/src/brain/incident.rs";
const LIFE: &str = "control/src/brain/life.rs";
const NICS: &str = "control/src/brain/nics.rs";
const OWN: &str = "control/src/brain/own.rs";
const PEER: &str = "control/src/brain/peer.rs";
const PLAN: &str = "control/src/brain/plan.rs";
const RESTART: &str = "control/src/brain/restart.rs";
const RAIL: &str = "control/src/brain/rail.rs";
const SERVER: &str = "control/src/brain/server.rs";
const SHAKE: &str = "control/src/brain/shake.rs";
const WAYS: &str = "control/src/brain/fabric.rs";

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "affinity-forgets-the-peers-rails",
        without: "a rail that our affinity leaves out carries nothing of ours, though the peer asked for it",
        edits: &[Edit { file: PLAN, from: "self.affinity(nic, &devices).is_none() ||", to: "true ||" }],
        catcher: SIMULATION.test("peer_affinity_binds_rails_that_the_peer_asked_for_too"),
    },
    Mutant {
        name: "segment-alone-is-a-start",
        without: "a node has begun when both its keys are in the store",
        edits: &[Edit { file: OWN, from: "if !self.own.begun && self.own.placed {", to: "if !self.own.begun {" }],
        catcher: BRAINS.test("a_segment_without_its_address_is_no_start"),
    },
    Mutant {
        name: "lost-segment-is-not-looked-for",
        without: "a node looks whether its segment is still in the store",
        edits: &[Edit {
            file: OWN,
            from: "(Ok(None), false) = (result, self.own.putting)",
            to: "(Ok(None), false) = (result, true)",
        }],
        catcher: BRAINS.test("keys_that_the_store_lost_are_put_again"),
    },
    Mutant {
        name: "back-off-does-not-grow",
        without: "waits between attempts double",
        edits: &[Edit {
            file: REPAIR,
            from: "checked_shl(self.failures.min(20))",
            to: "checked_shl(self.failures.min(0))",
        }],
        catcher: UNIT.test("repair::tests::waits_grow_to_the_cap_and_start_again_after_a_reset"),
    },
    Mutant {
        name: "no-mtu-step-down",
        without: "a path MTU that may be wrong is tried one step smaller",
        edits: &[Edit { file: REPAIR, from: "self.current = used.step_down();", to: "self.current = Some(used);" }],
        catcher: UNIT.test("repair::tests::each_smaller_mtu_is_tried_once_and_the_working_one_kept"),
    },
    Mutant {
        name: "working-mtu-is-suspected",
        without: "an MTU that worked is kept",
        edits: &[Edit { file: REPAIR, from: "if self.known || self.exhausted {", to: "if self.exhausted {" }],
        catcher: UNIT.test("repair::tests::each_smaller_mtu_is_tried_once_and_the_working_one_kept"),
    },
    Mutant {
        name: "numbers-are-enough",
        without: "the same queue pair numbers in another incarnation are other queue pairs",
        edits: &[Edit {
            file: RESPONDER,
            from: "&& (request.extra.node.incarnation.is_none() || request.extra.node.incarnation == theirs.incarnation)",
            to: "",
        }],
        catcher: UNIT.test("handshake::tests::the_same_numbers_in_another_incarnation_are_other_queue_pairs"),
    },
    Mutant {
        name: "mtu-of-the-moment",
        without: "every hello about a pair of queue pairs says the path MTU that the first one said",
        edits: &[Edit {
            file: SHAKE,
            from: "&state.peer_path, Some(ours), &self.own_extra(), ready)",
            to: "&state.peer_path, Some(&OwnEnd { mtu: self.own_mtu(state.nic), ..ours.clone() }), &self.own_extra(), ready)",
        }],
        catcher: BRAINS.test("both_ends_use_one_path_mtu_whenever_it_changes"),
    },
    Mutant {
        name: "trial-blames-the-mtu",
        without: "a trial has no bytes, so one that fails says nothing of the MTU",
        edits: &[Edit {
            file: LIFE,
            from: "swallowed && state.swallowed > 1;",
            to: "class == FaultClass::Path && !error.proven || swallowed && state.swallowed > 1;",
        }],
        catcher: BRAINS.test("trials_that_fail_do_not_make_the_mtu_smaller_towards_a_stock_peer"),
    },
    Mutant {
        name: "carried-is-no-proof",
        without: "an MTU that has carried what the smaller ones could not is not suspected",
        edits: &[Edit { file: REPAIR, from: "self.carried(used, bytes, slices);", to: "" }],
        catcher: UNIT.test("repair::tests::an_mtu_that_carried_more_than_the_smaller_ones_could_is_not_suspected"),
    },
    Mutant {
        name: "refusal-is-overlooked",
        without: "a refusal comes before whatever else a reply says",
        edits: &[Edit {
            file: INITIATOR,
            from: "if let Some(text) = reply.refusal() {",
            to: "if let Some(text) = reply.refusal().filter(|_| reply.qp_num.is_empty()) {",
        }],
        catcher: UNIT.test("handshake::tests::a_refusal_comes_before_everything_else_it_says"),
    },
    Mutant {
        name: "waits-without-chance",
        without: "chance takes apart what began in one moment",
        edits: &[Edit {
            file: REPAIR,
            from: "wait - quarter + random.draw() % (2 * quarter + 1)",
            to: "wait - quarter + random.draw() % (2 * quarter + 1) / u64::MAX",
        }],
        catcher: BRAINS.test("peers_that_restart_are_not_stormed_by_those_who_miss_them"),
    },
    Mutant {
        name: "attempts-without-back-off",
        without: "an attempt waits until its back-off is over",
        edits: &[Edit { file: SHAKE, from: "&& state.retry_at.is_none_or(|at| at <= self.now)\n", to: "\n" }],
        catcher: BRAINS.test("peers_that_restart_are_not_stormed_by_those_who_miss_them"),
    },
    Mutant {
        name: "fresh-before-the-former-end",
        without: "no queue pairs are made for a peer while former ones may still accept something",
        edits: &[Edit {
            file: RAIL,
            from: "self.dying > 0 || self.old.iter().any(|life| life.failing.is_some())",
            to: "self.dying > 0",
        }],
        catcher: BRAINS.test("fresh_queue_pairs_are_no_proof_before_the_former_ones_are_in_err"),
    },
    Mutant {
        name: "gid-by-index",
        without: "our GID is looked up by its value whenever it is used",
        edits: &[Edit {
            file: CONNECT,
            from: "gid::find_by_value(t, plan.own_gid, plan.own_kind)).map(|entry| entry.index);",
            to: "t.first()).map(|entry| entry.index);",
        }],
        catcher: BRAINS.test("ports_that_flap_under_a_storm_heal"),
    },
    Mutant {
        name: "every-attempt-is-an-incident",
        without: "one incident, and one line, until a slice comes back",
        edits: &[Edit {
            file: INCIDENT,
            from: "let (peer, incident) = (state.peer, state.incident);",
            to: "let (peer, incident) = (state.peer, None::<u64>);",
        }],
        catcher: SIMULATION.test("charges::one_pair_that_fails_is_charged_to_the_pair"),
    },
    Mutant {
        name: "incidents-stay-open",
        without: "an incident is closed when its rail carries data again",
        edits: &[Edit { file: INCIDENT, from: "incident.closed = Some(now);", to: "" }],
        catcher: BRAINS.test("ports_that_flap_under_a_storm_heal"),
    },
    Mutant {
        name: "trial-awaited-for-ever",
        without: "a trial that never comes back ends the rail's life",
        edits: &[Edit { file: SHAKE, from: "&& self.now.since(life.since) >= TRIAL_WITHIN", to: "&& false" }],
        catcher: BRAINS.test("a_trial_that_never_comes_back_is_not_waited_for_for_ever"),
    },
    Mutant {
        name: "lost-keys-stay-lost",
        without: "our keys are put again when the store lost them",
        edits: &[Edit {
            file: OWN,
            from: "None => self.republish(\"our keys are gone from the store\"),",
            to: "None => {}",
        }],
        catcher: BRAINS.test("keys_that_the_store_lost_are_put_again"),
    },
    Mutant {
        name: "failed-put-is-not-repeated",
        without: "a node that could not be published is tried again",
        edits: &[Edit { file: OWN, from: "self.own.retry_at = Some(self.now.plus(AGAIN));", to: "" }],
        catcher: BRAINS.test("keys_that_the_store_lost_are_put_again"),
    },
    Mutant {
        name: "restart-elsewhere-is-proof",
        without: "another incarnation proves the fence only on the same host",
        edits: &[Edit {
            file: RESTART,
            from: "life.proof |= same_host && life",
            to: "life.proof |= (same_host || true) && life",
        }],
        catcher: BRAINS.test("a_successor_proves_by_an_answer_and_only_for_its_host"),
    },
    Mutant {
        name: "a-word-is-proof",
        without: "only a life that answers is proven to come after another",
        edits: &[Edit { file: RESTART, from: "if asked_since {", to: "if asked_since || asked.is_none() {" }],
        catcher: UNIT.test("brain::explored::two_ends_come_together_after_a_restart_in_the_middle"),
    },
    Mutant {
        name: "connected-to-the-past",
        without: "what is connected when its process is known to be over is dropped",
        edits: &[Edit { file: SHAKE, from: "then if is_over => {", to: "then if is_over && false => {" }],
        catcher: UNIT.test("brain::explored::two_ends_come_together_after_a_restart_in_the_middle"),
    },
    Mutant {
        name: "own-end-proves-the-peers",
        without: "our end in ERR proves nothing of the peer's",
        edits: &[Edit {
            file: LIFE,
            from: "Outcome::Failed(admins) => life.admins = admins,",
            to: "Outcome::Failed(admins) => (life.admins, life.proof) = (admins, true),",
        }],
        catcher: SIMULATION.test("a_write_to_a_node_that_died_is_in_quarantine_until_its_successor_is_seen"),
    },
    Mutant {
        name: "successor-proves-nothing",
        without: "another incarnation on the same host ends a quarantine",
        edits: &[
            Edit {
                file: RESTART,
                from: "life.proof |= same_host && life",
                to: "life.proof |= same_host && life.since == self.now && life",
            },
            Edit {
                file: LIFE,
                from: "life.proof |= same_process || same_boot || life.peer_gid == theirs.gid;",
                to: "life.proof |= !life.needs_fence && (same_process || same_boot);",
            },
        ],
        catcher: SIMULATION.test("a_write_to_a_node_that_died_is_in_quarantine_until_its_successor_is_seen"),
    },
    Mutant {
        name: "fence-answered-too-early",
        without: "a peer that asks is answered only when our end of its queue pairs is retired",
        edits: &[Edit { file: FENCE, from: "if failing || self.is_paired(rail, asked) {", to: "if false {" }],
        catcher: BRAINS.test("whoever_asks_for_the_fence_waits_for_our_end"),
    },
    Mutant {
        name: "nothing-is-repaired",
        without: "a rail that was lost is connected again",
        edits: &[Edit {
            file: SHAKE,
            from: "let ready = matches!(state.end, End::Down)",
            to: "let ready = state.lives == 0 && matches!(state.end, End::Down)",
        }],
        catcher: SIMULATION.test("a_link_that_goes_down_and_up_is_used_again"),
    },
    Mutant {
        name: "back-off-outlives-its-failures",
        without: "a rail that works again has all its attempts anew",
        edits: &[Edit {
            file: LIFE,
            from: "(state.failing_since, state.failures, state.trouble) = (None, 0, None);",
            to: "state.trouble = None;",
        }],
        catcher: SIMULATION.test("a_rail_that_fails_anew_has_all_its_attempts_anew"),
    },
    Mutant {
        name: "given-up-requests-displace",
        without: "a hello that was given up displaces no rail that was connected since",
        edits: &[Edit { file: SHAKE, from: "self.hear(rail, &reply);\n", to: "\n" }],
        catcher: SIMULATION.test("twins::twin_hello_that_arrives_when_it_was_given_up"),
    },
    Mutant {
        name: "any-reply-is-proof",
        without: "fresh queue pairs prove the fence only of the same process, or on the same host",
        edits: &[Edit {
            file: LIFE,
            from: "life.proof |= same_process || same_boot || life.peer_gid == theirs.gid;",
            to: "life.proof |= same_process || same_boot || life.peer_gid != theirs.gid || !life.proof;",
        }],
        catcher: BRAINS.test("fresh_queue_pairs_of_another_host_prove_nothing"),
    },
    Mutant {
        name: "past-life-is-not-looked-into",
        without: "a life that speaks although it counts as over is asked about",
        edits: &[Edit { file: SERVER, from: "self.ask_who_lives(peer);", to: "" }],
        catcher: BRAINS.test("a_late_word_of_a_life_before_is_found_out_by_asking"),
    },
    Mutant {
        name: "older-descriptor-is-newer",
        without: "a descriptor of another life counts only if it was asked for after the present one was heard of",
        edits: &[Edit {
            file: PEER,
            from: "asked.is_none_or(|token| token.0 <= renewed)",
            to: "asked.is_none() && renewed > 0",
        }],
        catcher: BRAINS.test("a_descriptor_that_was_asked_for_before_a_restart_is_asked_for_again"),
    },
    Mutant {
        name: "half-made-rails-wait",
        without: "whoever waits to hear that a rail is ready asks",
        edits: &[Edit { file: SHAKE, from: "moonrail && waited >= READY_ASKED", to: "false && waited >= READY_ASKED" }],
        catcher: BRAINS.test("a_rail_that_is_made_for_a_request_that_was_given_up_is_asked_about"),
    },
    Mutant {
        name: "port-down-is-not-told",
        without: "peers are told of rails that ended with our port",
        edits: &[Edit { file: LIFE, from: "life.untold = true;", to: "life.untold = false;" }],
        catcher: SIMULATION.test("twins::twin_link_down_and_up"),
    },
    Mutant {
        name: "better-fabric-is-forgotten",
        without: "a better fabric that works again is taken back",
        edits: &[Edit { file: WAYS, from: "chosen | retried\n", to: "chosen | (retried & 0)\n" }],
        catcher: FABRICS.test("shared_memory_that_fails_for_now_is_taken_back_when_it_works"),
    },
    Mutant {
        name: "peer-is-never-charged",
        without: "two NICs that do not reach a peer are charged to the peer",
        edits: &[Edit {
            file: INCIDENT,
            from: "if of_peer && all(&|other| other.nic != state.nic) && !works(&reached) {",
            to: "if false && !works(&reached) {",
        }],
        catcher: SIMULATION.test("charges::two_nics_that_do_not_reach_a_nic_of_a_peer_are_one_incident_of_the_peer"),
    },
    Mutant {
        name: "port-is-never-charged",
        without: "two peers that one port does not reach are charged to the port",
        edits: &[Edit {
            file: INCIDENT,
            from: "of_port && all(&|other| other.peer != state.peer) && !works",
            to: "false && !works",
        }],
        catcher: SIMULATION.test("charges::two_peers_that_one_port_does_not_reach_are_one_incident_of_the_port"),
    },
    Mutant {
        name: "peer-that-others-reach-is-charged",
        without: "a peer that other rails reach is not at fault",
        edits: &[Edit {
            file: INCIDENT,
            from: "other.nic != state.nic) && !works(&reached) {",
            to: "other.nic != state.nic) && (!works(&reached) || true) {",
        }],
        catcher: SIMULATION.test("charges::two_pairs_of_a_peer_that_others_reach_are_two_incidents"),
    },
    Mutant {
        name: "port-that-works-is-charged",
        without: "a port that carries something is not at fault",
        edits: &[Edit {
            file: INCIDENT,
            from: "!works(&|other| other.nic == state.nic) {",
            to: "(!works(&|other| other.nic == state.nic) || true) {",
        }],
        catcher: SIMULATION.test("charges::a_port_that_reaches_a_third_peer_is_not_at_fault"),
    },
    Mutant {
        name: "rails-of-a-port-on-their-own",
        without: "what a port that is down takes with it is one incident",
        edits: &[Edit {
            file: INCIDENT,
            from: "(Charge::Port, Charge::Pair | Charge::Port) | (Charge::Pair, Charge::Port) if of_port",
            to: "(Charge::Port, Charge::Pair) | (Charge::Pair, Charge::Port) if of_port",
        }],
        catcher: SIMULATION.test("charges::a_port_that_says_so_is_one_incident_however_many_rails_it_has"),
    },
    Mutant {
        name: "explained-incidents-stay",
        without: "an incident ends that another one explains",
        edits: &[Edit {
            file: INCIDENT,
            from: "**other != number && all && open.charge == Charge::Pair",
            to: "**other == number && all && open.charge == Charge::Request",
        }],
        catcher: SIMULATION.test("charges::a_peer_that_dies_is_one_incident_in_the_end"),
    },
    Mutant {
        name: "first-rail-closes-for-all",
        without: "an incident is over when each of its rails carries data again",
        edits: &[Edit {
            file: INCIDENT,
            from: "if open.rails.iter().any(|other| self.rails[*other].incident == Some(number)) {",
            to: "if open.rails.is_empty() {",
        }],
        catcher: SIMULATION.test("charges::two_nics_that_do_not_reach_a_nic_of_a_peer_are_one_incident_of_the_peer"),
    },
    Mutant {
        name: "port-active-is-overheard",
        without: "a port that is active again is looked at, and used, at once",
        edits: &[Edit {
            file: NICS,
            from: "AsyncEvent::PortActive(_) | AsyncEvent::GidChange(_)",
            to: "AsyncEvent::PortActive(_) => {}\n            AsyncEvent::GidChange(_)",
        }],
        catcher: UNIT.test("brain::explored::a_rail_that_fails_comes_back_and_nothing_is_taken_for_fenced_too_early"),
    },
    Mutant {
        name: "what-is-given-up-is-joined",
        without: "an end that says to which of ours it is connected is connected to no other",
        edits: &[Edit { file: RESPONDER, from: "if !bound.is_empty() &&", to: "if false && !bound.is_empty() &&" }],
        catcher: SIMULATION.test("twins::twin_nic_that_loses_everything_it_sends_while_words_are_slow"),
    },
    Mutant {
        name: "two-hellos-at-once",
        without: "one hello of a rail is on its way at a time",
        edits: &[Edit { file: SHAKE, from: "&& state.asked.is_none()\n            && self.nics", to: "&& self.nics" }],
        catcher: UNIT.test("brain::explored::a_rail_that_fails_comes_back_and_nothing_is_taken_for_fenced_too_early"),
    },
    Mutant {
        name: "past-incarnations-are-heard",
        without: "what comes late from a former process of a peer is refused",
        edits: &[Edit {
            file: RESTART,
            from: "None if lives.is_past(incarnation) => return false,",
            to: "None if lives.is_past(incarnation) && lives.past.is_empty() => return false,",
        }],
        catcher: UNIT.test("brain::explored::two_ends_come_together_after_a_restart_in_the_middle"),
    },
    Mutant {
        name: "reply-of-a-successor-is-taken",
        without: "a reply with the same queue pair numbers from another incarnation is of another end",
        edits: &[Edit {
            file: INITIATOR,
            from: "reply.qp_num == theirs.qpns && (life.is_none() || life == theirs.incarnation)",
            to: "reply.qp_num == theirs.qpns && (life.is_none() || life.is_some())",
        }],
        catcher: UNIT.test("brain::explored::two_ends_come_together_after_a_restart_in_the_middle"),
    },
    Mutant {
        name: "err-before-it-is",
        without: "queue pairs of a former life count as drained only when they are in ERR",
        edits: &[Edit {
            file: RAIL,
            from: "self.failing.is_none() && self.overdue.is_empty() && ",
            to: "self.overdue.is_empty() && ",
        }],
        catcher: UNIT.test("brain::explored::a_rail_that_fails_comes_back_and_nothing_is_taken_for_fenced_too_early"),
    },
];
