//! Threads of the engine: their names, and the CPUs that data cores are pinned to.

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// CPUs this process may use (its affinity mask); empty if the system does not tell.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}

/// Starts a thread called `name`, pinned to `cpu` if one is given. `unpinned` is told if that fails; the thread runs
/// anyway.
pub(crate) fn spawn(
    name: String,
    cpu: Option<usize>,
    unpinned: impl FnOnce(usize) + Send + 'static,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).spawn(move || {
        // A CPU that is not allowed cannot be had, and one past the kernel's mask would abort the process in there.
        let pinned =
            |cpu| allowed_cpus().contains(&cpu) && core_affinity::set_for_current(core_affinity::CoreId { id: cpu });
        if let Some(cpu) = cpu.filter(|cpu| !pinned(*cpu)) {
            unpinned(cpu);
        }
        body();
    })
}

/// Joins `thread` if it ends before `until`; gives it back if not.
pub(crate) fn join_until(thread: JoinHandle<()>, until: Instant) -> Result<(), JoinHandle<()>> {
    while !thread.is_finished() {
        if Instant::now() >= until {
            return Err(thread);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    // It ended; that it panicked was told where its panic was caught.
    let _ = thread.join();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_thread_has_its_name_and_runs_although_it_cannot_be_pinned() {
        let (say, hear) = mpsc::channel();
        let told = say.clone();
        let thread = spawn(
            "mr-test".into(),
            Some(1 << 14),
            move |cpu| told.send(format!("no {cpu}")).unwrap(),
            move || say.send(std::thread::current().name().unwrap().to_owned()).unwrap(),
        )
        .unwrap();
        assert_eq!(hear.iter().collect::<Vec<_>>(), ["no 16384", "mr-test"]);
        join_until(thread, Instant::now() + Duration::from_secs(5)).unwrap();
    }
}
