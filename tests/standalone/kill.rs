//! kill -9 at random points: whatever was under way, every call can be repeated, and nothing is left behind.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::calls::MIB;
use crate::home::{Controller, Home, NODE, OTHER_NODE, PATIENCE, Parent, process_of, send};

const KILLS: usize = 200;

/// Volumes that come and go.
const VOLUMES: usize = 4;

/// SplitMix64: small, and the same everywhere for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let index = self.below(from.len() as u64);
        from[usize::try_from(index).unwrap()]
    }
}

/// A volume as its orchestrator knows it: from what was answered, or from having repeated the call until it was.
#[derive(Debug, Clone, Default)]
struct Known {
    name: String,
    id: String,
    size: i64,
    /// The node and the attachment.
    published: Option<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Create,
    Publish,
    Unpublish,
    Expand,
    Delete,
}

impl Known {
    fn exists(&self) -> bool {
        self.size > 0
    }

    /// A call that an orchestrator could make now.
    fn next(&self, random: &mut Random) -> Call {
        match (self.exists(), &self.published) {
            (false, _) => Call::Create,
            (true, None) => {
                random.pick(&[Call::Publish, Call::Publish, Call::Expand, Call::Delete])
            }
            (true, Some(_)) => random.pick(&[Call::Unpublish, Call::Unpublish, Call::Expand]),
        }
    }

    /// Makes the call, and returns what is known after it.
    async fn call(mut self, parent: &Controller, call: Call, random: u64) -> Result<Self, Status> {
        match call {
            Call::Create => {
                let size = MIB * (1 + i64::try_from(random % 8).unwrap());
                let volume = parent.create(&self.name, size).await?;
                assert_eq!(volume.capacity_bytes, size);
                self.id = volume.volume_id;
                self.size = size;
            }
            Call::Publish => {
                let node = if random.is_multiple_of(2) {
                    NODE
                } else {
                    OTHER_NODE
                };
                let attachment = parent.publish(&self.id, node).await?;
                self.published = Some((node.to_owned(), attachment));
            }
            Call::Unpublish => {
                let node = self.published.as_ref().unwrap().0.clone();
                parent.unpublish(&self.id, &node).await?;
                self.published = None;
            }
            Call::Expand => {
                let size = self.size + MIB;
                assert_eq!(parent.expand(&self.id, size).await?, size);
                self.size = size;
            }
            Call::Delete => {
                parent.delete(&self.id).await?;
                self.size = 0;
                self.id.clear();
            }
        }
        Ok(self)
    }

    /// Repeats the call as an orchestrator does: until it is answered.
    async fn repeat(self, parent: &Controller, call: Call, random: u64) -> Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.clone().call(parent, call, random).await {
                Ok(known) => return known,
                Err(status) => {
                    let retry = matches!(status.code(), Code::Unavailable | Code::Aborted);
                    assert!(
                        retry && Instant::now() < deadline,
                        "{call:?} {self:?}: {status}"
                    );
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

struct Round {
    home: Home,
    parent: Parent,
    random: Random,
    volumes: Vec<Known>,
    /// Calls that the kill left without an answer, and calls in all.
    interrupted: usize,
    calls: usize,
}

impl Round {
    /// Begins some calls, kills the parent before they may be over, and repeats them with the next one.
    async fn run(&mut self) {
        let mut begun = Vec::new();
        for index in 0..VOLUMES {
            if self.random.below(2) == 0 {
                let call = self.volumes[index].next(&mut self.random);
                begun.push((index, call, self.random.next()));
            }
        }
        let mut calls = JoinSet::new();
        for &(index, call, random) in &begun {
            let (known, parent) = (self.volumes[index].clone(), self.parent.controller.clone());
            calls.spawn(async move { (index, known.call(&parent, call, random).await) });
        }
        let longest = self.random.pick(&[5_000, 40_000, 150_000]);
        tokio::time::sleep(Duration::from_micros(self.random.below(longest))).await;
        self.parent.kill();
        let mut answered = HashMap::new();
        while let Some(called) = calls.join_next().await {
            if let (index, Ok(known)) = called.unwrap() {
                answered.insert(index, known);
            }
        }
        self.calls += begun.len();
        self.interrupted += begun.len() - answered.len();
        self.harm().await;
        self.parent = self.home.start().await;
        for (index, call, random) in begun {
            let before = self.volumes[index].clone();
            let after = before.repeat(&self.parent, call, random).await;
            if let Some(answer) = answered.remove(&index) {
                // What was answered before the kill holds after it.
                assert_eq!(format!("{answer:?}"), format!("{after:?}"), "{call:?}");
            }
            self.volumes[index] = after;
        }
    }

    /// Sometimes kills a server too, or the next parent while it is coming up.
    async fn harm(&mut self) {
        if self.random.below(4) == 0
            && let Some(&server) = self.home.server_processes().first()
        {
            send(server, Signal::KILL);
        }
        if self.random.below(4) == 0 {
            let mut parent = self.home.spawn(&["--overcommit", "1000"]);
            tokio::time::sleep(Duration::from_micros(self.random.below(100_000))).await;
            parent.kill().unwrap();
            parent.wait().unwrap();
        }
    }

    /// What the machine has must be what the orchestrator knows, and no more.
    async fn check(&self) {
        let mut there = self.parent.volumes().await;
        for known in self.volumes.iter().filter(|known| known.exists()) {
            let (size, nodes) = there.remove(&known.id).unwrap();
            assert_eq!(size, known.size);
            let published: Vec<_> = known
                .published
                .iter()
                .map(|(node, _)| node.clone())
                .collect();
            assert_eq!(nodes, published);
            let server = self.home.next_server(&known.id, 0).await;
            // It is brought into line before anybody can use it, so there is nothing to wait for once it is up.
            let known_after = self.parent.create(&known.name, known.size).await.unwrap();
            assert_eq!(known_after.volume_id, known.id);
            let served = self.home.statistics(&known.id).await.unwrap();
            let allowed: Vec<_> = served.attachments.iter().map(|one| &one.id).collect();
            let attachments: Vec<_> = known.published.iter().map(|(_, id)| id).collect();
            assert_eq!(allowed, attachments, "{known:?}");
            assert_eq!(i64::try_from(served.size_bytes).unwrap(), known.size);
            assert!(process_of(&server) > 0);
        }
        assert!(there.is_empty(), "volumes that nobody made: {there:?}");
        let expected = self.volumes.iter().filter(|known| known.exists()).count();
        let deadline = Instant::now() + PATIENCE;
        // A volume has a directory in the pool and in the state, two Secrets and a process.
        while self.home.leftovers().len() != 5 * expected {
            let left = self.home.leftovers();
            assert!(
                Instant::now() < deadline,
                "{expected} volumes, but {left:?}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_two_hundred_points_every_call_can_be_repeated_and_nothing_leaks() {
    let seed = std::env::var("HAWSER_SEED").map_or_else(
        |_| {
            std::time::UNIX_EPOCH
                .elapsed()
                .unwrap()
                .subsec_nanos()
                .into()
        },
        |seed| seed.parse().unwrap(),
    );
    println!("HAWSER_SEED={seed}");
    let home = Home::new();
    let parent = home.start().await;
    let volumes = (0..VOLUMES).map(|n| Known {
        name: format!("pvc-{n}"),
        ..Known::default()
    });
    let mut round = Round {
        home,
        parent,
        random: Random(seed),
        volumes: volumes.collect(),
        interrupted: 0,
        calls: 0,
    };
    for kill in 0..KILLS {
        round.run().await;
        round.check().await;
        let (interrupted, calls) = (round.interrupted, round.calls);
        println!("kill {kill}: {interrupted} of {calls} calls were interrupted");
    }
    // Else the kills came too early or too late to show anything.
    assert!(round.interrupted > KILLS / 2);
    for known in round.volumes.iter().filter(|known| known.exists()) {
        if let Some((node, _)) = &known.published {
            round.parent.unpublish(&known.id, node).await.unwrap();
        }
        round.parent.delete(&known.id).await.unwrap();
    }
    assert_eq!(round.home.leftovers(), Vec::<String>::new());
}
