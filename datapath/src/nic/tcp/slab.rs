//! Seats with generations: a key of an earlier tenant finds nobody.

/// A seat and which tenant of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key {
    slot: u32,
    generation: u32,
}

impl Key {
    pub(super) fn slot(self) -> u32 {
        self.slot
    }

    /// As a number below 2^62.
    pub(super) fn bits(self) -> u64 {
        u64::from(self.generation & 0x3fff_ffff) << 32 | u64::from(self.slot)
    }
}

struct Seat<T> {
    generation: u32,
    value: Option<Box<T>>,
}

/// A table whose entries keep their place.
pub(super) struct Slab<T> {
    seats: Vec<Seat<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self { seats: Vec::new(), free: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.seats.len() == self.free.len()
    }

    /// One more than the highest slot ever in use.
    pub(super) fn slots(&self) -> u32 {
        self.seats.len() as u32
    }

    pub(super) fn insert(&mut self, value: T) -> Key {
        let value = Some(Box::new(value));
        let Some(slot) = self.free.pop() else {
            self.seats.push(Seat { generation: 0, value });
            return Key { slot: self.seats.len() as u32 - 1, generation: 0 };
        };
        let seat = &mut self.seats[slot as usize];
        seat.generation = seat.generation.wrapping_add(1);
        seat.value = value;
        Key { slot, generation: seat.generation }
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<Box<T>> {
        let value = self.seats.get_mut(slot as usize)?.value.take()?;
        self.free.push(slot);
        Some(value)
    }

    pub(super) fn at(&mut self, slot: u32) -> Option<&mut T> {
        self.seats.get_mut(slot as usize)?.value.as_deref_mut()
    }

    pub(super) fn get(&self, key: Key) -> Option<&T> {
        let seat = self.seats.get(key.slot as usize)?;
        seat.value.as_deref().filter(|_| seat.generation == key.generation)
    }

    /// Bits of the key of whoever sits there.
    pub(super) fn key(&self, slot: u32) -> u64 {
        self.seats.get(slot as usize).map_or(0, |seat| Key { slot, generation: seat.generation }.bits())
    }

    /// The slot of a key's bits, if its tenant still sits there.
    pub(super) fn slot_of(&self, bits: u64) -> Option<u32> {
        let slot = bits as u32;
        let seat = self.seats.get(slot as usize)?;
        (seat.value.is_some() && self.key(slot) == bits).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_finds_nobody() {
        let mut slab = Slab::new();
        let old = slab.insert('a');
        assert_eq!(slab.slot_of(old.bits()), Some(0));
        assert_eq!(slab.remove(old.slot()).as_deref(), Some(&'a'));
        assert!(slab.is_empty() && slab.slot_of(old.bits()).is_none() && slab.remove(0).is_none());
        let new = slab.insert('b');
        assert_eq!((new.slot(), slab.slot_of(old.bits()), slab.get(new)), (0, None, Some(&'b')));
    }
}
