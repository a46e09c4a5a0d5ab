//! A node's own pages: put, find, evict the one that was not used for longest.

use std::collections::{BTreeMap, HashMap};

use moonrail::{Engine, Region};

use crate::layout::{BUCKET, Bucket, Key, Shape, page_head};

/// Pages of one node, in registered memory that others read without asking. Of one thread.
pub(crate) struct Store {
    region: Region,
    shape: Shape,
    /// Page of each key, and when it was used last.
    places: HashMap<Key, (u64, u64)>,
    /// Keys by when they were used last.
    ages: BTreeMap<u64, Key>,
    free: Vec<u64>,
    clock: u64,
    /// Pages that had to go for others.
    pub(crate) evicted: u64,
}

impl Store {
    /// Takes the memory from `engine`.
    pub(crate) fn new(engine: &Engine, shape: Shape) -> Result<Self, Box<dyn std::error::Error>> {
        let region = engine.allocate(shape.bytes() as usize, "*")?;
        region.write(0, &shape.encode())?;
        let free = (0..shape.pages).rev().collect();
        Ok(Self { region, shape, places: HashMap::new(), ages: BTreeMap::new(), free, clock: 0, evicted: 0 })
    }

    /// Keeps `bytes`, a page, under `key`. Others find it when this returns.
    pub(crate) fn put(&mut self, key: Key, bytes: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
        assert_eq!(bytes.len() as u64, self.shape.page);
        if let Some((_, used)) = self.places.get(&key) {
            let used = *used;
            self.ages.remove(&used);
            self.touch(key);
            return Ok(());
        }
        let page = match self.free.pop() {
            Some(page) => page,
            None => self.evict()?,
        };
        let at = self.shape.page_at(page);
        // First the bytes, then the head that proves them, then the way to them.
        self.region.write(at + crate::layout::PAGE_HEAD, bytes)?;
        self.region.write(at, &page_head(key, bytes))?;
        let mut bucket = self.bucket(key)?;
        match bucket.0.iter_mut().find(|(of, _)| *of == 0) {
            Some(entry) => *entry = (key.0, page),
            None => {
                // Too many keys fall into this bucket: the first one makes room.
                let lost = Key(bucket.0[0].0);
                bucket.0[0] = (key.0, page);
                if let Some((page, used)) = self.places.remove(&lost) {
                    self.ages.remove(&used);
                    self.free.push(page);
                    self.evicted += 1;
                }
            }
        }
        self.region.write(self.shape.bucket_at(key), &bucket.encode())?;
        self.places.insert(key, (page, 0));
        self.touch(key);
        Ok(())
    }

    fn touch(&mut self, key: Key) {
        self.clock += 1;
        if let Some((_, used)) = self.places.get_mut(&key) {
            *used = self.clock;
        }
        self.ages.insert(self.clock, key);
    }

    /// The page that was not used for longest; nobody finds it any more.
    fn evict(&mut self) -> Result<u64, Box<dyn std::error::Error>> {
        let (_, key) = self.ages.pop_first().ok_or("a store without pages")?;
        let (page, _) = self.places.remove(&key).ok_or("a key without a page")?;
        let mut bucket = self.bucket(key)?;
        bucket.0.iter_mut().filter(|(of, _)| *of == key.0).for_each(|entry| *entry = (0, 0));
        self.region.write(self.shape.bucket_at(key), &bucket.encode())?;
        // Whoever found it before reads a head that proves nothing.
        self.region.write(self.shape.page_at(page), &[0; crate::layout::PAGE_HEAD as usize])?;
        self.evicted += 1;
        Ok(page)
    }

    fn bucket(&self, key: Key) -> Result<Bucket, Box<dyn std::error::Error>> {
        let mut bytes = [0; BUCKET as usize];
        self.region.read(self.shape.bucket_at(key), &mut bytes)?;
        Ok(Bucket::decode(&bytes))
    }

    /// Pages held now.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }
}
