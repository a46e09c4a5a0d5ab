//! What a test does with a node as its embedder would: opens peers, submits, looks at rails and bytes.

use super::*;

impl Cluster {
    /// Opens the segment of `to` at `from`, or says why not.
    pub(crate) fn open(&mut self, from: usize, to: usize) -> Result<Arc<RemoteSegment>, String> {
        let name = self.nodes[to].name.clone();
        let id = self.call(from, Call::Open { name, fresh: false, policy: None }, Nanos::from_secs(5));
        self.await_open(from, id)
    }

    /// The same, but never from what is known already.
    pub(crate) fn open_anew(&mut self, from: usize, to: usize) -> Result<Arc<RemoteSegment>, String> {
        let name = self.nodes[to].name.clone();
        let id = self.call(from, Call::Open { name, fresh: true, policy: None }, Nanos::from_secs(5));
        self.await_open(from, id)
    }

    pub(crate) fn await_open(&mut self, from: usize, id: CallId) -> Result<Arc<RemoteSegment>, String> {
        assert!(
            self.run_until(Nanos::from_secs(6), |c| c.nodes[from].answers.contains_key(&id)),
            "every call is answered"
        );
        match self.take_answer(from, id) {
            Some(Answer::Opened(result)) => result.map_err(|e| e.to_string()),
            other => panic!("not an answer to open: {other:?}"),
        }
    }

    pub(crate) fn rails(&mut self, node: usize) -> Vec<RailReport> {
        let id = self.call(node, Call::Rails, Nanos::from_secs(1));
        match self.take_answer(node, id) {
            Some(Answer::Rails(rails)) => rails,
            other => panic!("not an answer to rails: {other:?}"),
        }
    }

    pub(crate) fn usable_rails(&mut self, node: usize) -> usize {
        self.rails(node).iter().filter(|r| r.state == RailState::Usable).count()
    }

    /// Submits one transfer of `len` bytes between the same offsets of both regions.
    pub(crate) fn submit(&mut self, from: usize, to: &RemoteSegment, op: Op, at: u64, len: u64) -> Arc<Work> {
        self.submit_pieces(from, to, op, (at, len), len, Nanos::from_secs(30))
    }

    /// Submits `len` bytes as transfers of `piece` bytes, each between the same offsets of both regions, to be over `within`.
    pub(crate) fn submit_pieces(
        &mut self,
        from: usize,
        to: &RemoteSegment,
        op: Op,
        (at, len): (u64, u64),
        piece: u64,
        within: Nanos,
    ) -> Arc<Work> {
        let local = self.nodes[from].region.clone();
        let remote = to.buffers.clone();
        let near: Vec<Extent> = local.chunks().iter().map(|c| Extent { addr: c.addr, len: c.len }).collect();
        let find_near = |a| find_extent(&near, a);
        let (mut slices, mut transfers) = (Slices::new(), Lens::new());
        for offset in (0..len).step_by(piece as usize) {
            let piece = piece.min(len - offset);
            let base = RemoteAddr(remote.buffers[0].extent.addr + at + offset);
            let near = near[0].addr + at + offset;
            let number = transfers.len() as u32;
            let far = |a| remote.find(a);
            tile(number, near, base, piece, SliceRule::default(), find_near, far, &mut slices).unwrap();
            transfers.push(piece);
        }
        let work = Work::new(WorkParts {
            op,
            slices,
            transfers,
            local,
            remote,
            submitted: self.now,
            deadline: self.now.plus(within),
            cores: self.nodes[from].inboxes.len() as u16,
            retries: 9,
            completion: Completion::new(1),
        });
        dispatch(work.clone(), &self.nodes[from].inboxes).ok().expect("rings have room");
        work
    }

    pub(crate) fn bytes(&self, node: usize, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.nodes[node].region.memory().read(at, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn fill(&self, node: usize, at: u64, bytes: &[u8]) {
        self.nodes[node].region.memory().write(at, bytes).unwrap();
    }
}
