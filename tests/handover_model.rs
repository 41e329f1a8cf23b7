//! The protocol of `docs/explanation/handover.md`, walked through in every interleaving: a service that waits, two
//! daemons of which each may freeze, die or be taken over from at any moment, and Glance and Ceph as far as they decide
//! anything.
//!
//! A step is one call that others can see; reading and acting upon what was read are two. The faults are planted to
//! show that the walk would find them.

use std::collections::HashSet;

/// What is left out of the protocol, or done wrong, to see that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The daemon publishes as soon as it has prepared everything.
    PublishesWithoutGo,
    /// The daemon says that it declined before it has taken its copy back.
    TellsBeforeItTookDown,
    /// The service does the work itself after it committed, on a mere timeout.
    FallsBackAfterGo,
    /// The service commits and does not wait for the outcome.
    TakesGoForDone,
    /// The daemon does not store the commit, so that the next one may decline by timeout while the copy is out.
    ForgetsGo,
    /// A daemon that lost its lease is not fenced.
    NoFence,
    /// The daemon takes the name whatever it finds there.
    OverwritesTheName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Status {
    Queued,
    Saving,
    Active(Writer),
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Writer {
    Daemon,
    Service,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Said {
    Nothing,
    Prepared,
    Declined,
}

/// What stands on the image record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Image {
    status: Status,
    offer: bool,
    go: bool,
    said: Said,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    Copying,
    Publishing,
    Ending,
    Ended,
}

/// The job's record, and what it has made in Ceph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Job {
    stage: Stage,
    committed: bool,
    /// The private copy.
    copy: bool,
    /// Who has the RBD image of the final name.
    name: Option<Writer>,
    /// The daemon that holds the lease; the other is fenced.
    owner: usize,
    takeovers: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Daemon {
    Dead,
    Idle,
    Begin,
    Copy,
    Show(Option<Image>),
    Look,
    Act(Image),
    Rename,
    MakeReady,
    Register,
    Verify(Option<Status>),
    End,
    TakeDown,
    Tell(Option<Image>),
    Conclude,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Service {
    Read,
    Decide(Image),
    SayGo,
    TakeOff,
    Put,
    Create,
    Complete,
    Recheck,
    Done,
    Raised,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    image: Image,
    job: Job,
    daemons: [Daemon; 2],
    service: Service,
    has_commit_tag: bool,
    doubted: bool,
    /// Set by a step that must not happen.
    broken: Option<&'static str>,
}

impl World {
    fn begin() -> Self {
        Self {
            image: Image { status: Status::Queued, offer: true, go: false, said: Said::Nothing },
            job: Job { stage: Stage::Copying, committed: false, copy: false, name: None, owner: 0, takeovers: 0 },
            daemons: [Daemon::Begin, Daemon::Idle],
            service: Service::Read,
            has_commit_tag: false,
            doubted: false,
            broken: None,
        }
    }

    /// All worlds that may come next.
    fn next(&self, fault: Fault) -> Vec<(String, World)> {
        let mut worlds = Vec::new();
        for daemon in 0..2 {
            for world in self.daemon_steps(daemon, fault) {
                worlds.push((
                    format!("daemon {daemon}: {:?} -> {:?}", self.daemons[daemon], world.daemons[daemon]),
                    world,
                ));
            }
        }
        for world in self.service_steps(fault) {
            worlds.push((format!("service: {:?} -> {:?}", self.service, world.service), world));
        }
        worlds
    }

    fn with(&self, change: impl FnOnce(&mut World)) -> World {
        let mut world = *self;
        change(&mut world);
        world
    }

    fn daemon_steps(&self, me: usize, fault: Fault) -> Vec<World> {
        let now = self.daemons[me];
        let go_to = |daemon: Daemon| self.with(|w| w.daemons[me] = daemon);
        let mut worlds = Vec::new();
        if now == Daemon::Dead {
            return worlds;
        }
        // the other does not renew its lease: dead, frozen or cut off
        if now == Daemon::Idle {
            if self.job.owner != me && self.job.takeovers < 2 && self.job.stage != Stage::Ended {
                worlds.push(self.with(|w| {
                    w.job.owner = me;
                    w.job.takeovers += 1;
                    w.daemons[me] = Daemon::Begin;
                }));
            }
            return worlds;
        }
        worlds.push(go_to(Daemon::Dead));
        // every change in Ceph, that of the job's record too
        let fenced = self.job.owner != me && fault != Fault::NoFence;
        let in_ceph =
            |change: &dyn Fn(&mut World)| self.with(|w| if fenced { w.daemons[me] = Daemon::Idle } else { change(w) });
        match now {
            Daemon::Dead | Daemon::Idle => {}
            Daemon::Begin => worlds.push(go_to(match self.job.stage {
                Stage::Copying => Daemon::Copy,
                Stage::Publishing if self.job.committed => Daemon::Rename,
                Stage::Publishing => Daemon::Show(None),
                Stage::Ending => Daemon::TakeDown,
                Stage::Ended => Daemon::Idle,
            })),
            Daemon::Copy => {
                worlds.push(in_ceph(&|w| {
                    (w.job.copy, w.job.stage) = (true, Stage::Publishing);
                    w.daemons[me] =
                        if fault == Fault::PublishesWithoutGo { Daemon::Rename } else { Daemon::Show(None) };
                }));
                // a source that cannot be copied after all
                worlds.push(go_to(Daemon::End));
            }
            Daemon::Show(None) => worlds.push(go_to(Daemon::Show(Some(self.image)))),
            Daemon::Show(Some(read)) => worlds.push(match (read.status, read.offer) {
                (Status::Queued, true) => self.with(|w| {
                    // refused by Glance where the property was taken off meanwhile
                    if w.image.offer {
                        w.image.said = Said::Prepared;
                    }
                    w.daemons[me] = Daemon::Look;
                }),
                _ => go_to(Daemon::End),
            }),
            Daemon::Look => worlds.push(go_to(Daemon::Act(self.image))),
            Daemon::Act(read) if read.status != Status::Queued => worlds.push(go_to(Daemon::End)),
            Daemon::Act(read) if read.go => worlds.push(in_ceph(&|w| {
                w.job.committed = fault != Fault::ForgetsGo;
                w.daemons[me] = Daemon::Rename;
            })),
            Daemon::Act(read) => {
                worlds.push(go_to(Daemon::End));
                if read.offer {
                    worlds.push(go_to(Daemon::Look));
                }
            }
            Daemon::Rename => worlds.push(in_ceph(&|w| {
                w.daemons[me] = match w.job.name {
                    Some(Writer::Service) if fault != Fault::OverwritesTheName => Daemon::End,
                    _ => {
                        (w.job.name, w.job.copy) = (Some(Writer::Daemon), false);
                        Daemon::MakeReady
                    }
                };
            })),
            // no tag and no property of ours may be on the image when it becomes active
            Daemon::MakeReady => worlds.push(self.with(|w| {
                if w.image.status == Status::Queued {
                    (w.image.offer, w.image.go, w.image.said) = (false, false, Said::Nothing);
                }
                w.daemons[me] = Daemon::Register;
            })),
            // Glance knows no fence; it may also refuse, or not be there
            Daemon::Register => worlds.extend([
                go_to(Daemon::Verify(None)),
                self.with(|w| {
                    match (w.image.status, w.job.name) {
                        (Status::Queued, Some(Writer::Daemon)) => {
                            w.image = Image {
                                status: Status::Active(Writer::Daemon),
                                offer: false,
                                go: false,
                                said: Said::Nothing,
                            };
                        }
                        (Status::Queued, Some(Writer::Service)) => {
                            w.broken = Some("Glance refuses the location and removes the service's data");
                        }
                        _ => {}
                    }
                    w.daemons[me] = Daemon::Verify(None);
                }),
            ]),
            Daemon::Verify(None) => worlds.push(go_to(Daemon::Verify(Some(self.image.status)))),
            Daemon::Verify(Some(Status::Active(Writer::Daemon))) => {
                worlds.push(in_ceph(&|w| (w.job.stage, w.daemons[me]) = (Stage::Ended, Daemon::Idle)));
            }
            Daemon::Verify(Some(Status::Queued)) => {
                worlds.push(go_to(Daemon::Register));
                worlds.push(go_to(Daemon::End));
            }
            Daemon::Verify(Some(_)) => worlds.push(go_to(Daemon::End)),
            Daemon::End => worlds.push(in_ceph(&|w| {
                w.job.stage = Stage::Ending;
                w.daemons[me] =
                    if fault == Fault::TellsBeforeItTookDown { Daemon::Tell(None) } else { Daemon::TakeDown };
            })),
            Daemon::TakeDown => worlds.push(in_ceph(&|w| {
                w.job.copy = false;
                if w.image.status == Status::Active(Writer::Daemon) {
                    // it went through after all
                    (w.job.stage, w.daemons[me]) = (Stage::Ended, Daemon::Idle);
                    return;
                }
                if w.job.name == Some(Writer::Daemon) {
                    w.job.name = None;
                }
                w.daemons[me] =
                    if fault == Fault::TellsBeforeItTookDown { Daemon::Conclude } else { Daemon::Tell(None) };
            })),
            Daemon::Tell(None) => worlds.push(go_to(Daemon::Tell(Some(self.image)))),
            Daemon::Tell(Some(read)) => worlds.push(self.with(|w| {
                let may_write = read.offer || read.go || w.job.committed;
                if read.status == Status::Queued && may_write && w.image.status == Status::Queued {
                    (w.image.said, w.image.offer, w.image.go) = (Said::Declined, false, false);
                }
                w.daemons[me] = if fault == Fault::TellsBeforeItTookDown { Daemon::TakeDown } else { Daemon::Conclude };
            })),
            Daemon::Conclude => {
                worlds.push(in_ceph(&|w| (w.job.stage, w.daemons[me]) = (Stage::Ended, Daemon::Idle)));
            }
        }
        worlds
    }

    fn service_steps(&self, fault: Fault) -> Vec<World> {
        let go_to = |service: Service| self.with(|w| w.service = service);
        let mut worlds = Vec::new();
        if matches!(self.service, Service::Done | Service::Raised | Service::Dead) {
            return worlds;
        }
        worlds.push(go_to(Service::Dead));
        match self.service {
            Service::Done | Service::Raised | Service::Dead => {}
            Service::Read => worlds.push(go_to(Service::Decide(self.image))),
            Service::Decide(Image { status: Status::Active(_), .. }) => worlds.push(go_to(Service::Done)),
            Service::Decide(Image { status: Status::Gone, .. }) => worlds.push(go_to(Service::Raised)),
            Service::Decide(Image { said: Said::Declined, .. }) => worlds.push(go_to(Service::TakeOff)),
            Service::Decide(_) if self.has_commit_tag && fault == Fault::TakesGoForDone => {
                worlds.push(go_to(Service::Done))
            }
            Service::Decide(read) => {
                worlds.push(go_to(Service::Read));
                if read.said == Said::Prepared && !read.go {
                    worlds.push(go_to(Service::SayGo));
                }
                // by any of its limits: no daemon took it, the copy did not start or made no progress, or took too long
                if !self.has_commit_tag || fault == Fault::FallsBackAfterGo {
                    worlds.push(go_to(Service::TakeOff));
                } else {
                    // minutes of silence, though a daemon may still be at work
                    worlds.push(self.with(|w| (w.doubted, w.service) = (true, Service::TakeOff)));
                }
            }
            Service::SayGo => {
                let said = self.with(|w| {
                    (w.has_commit_tag, w.image.go, w.service) = (true, w.image.status == Status::Queued, Service::Read);
                });
                // another change of the record at the same moment may take the tag off again
                worlds.push(said.with(|w| w.image.go = false));
                worlds.push(said);
            }
            Service::TakeOff => worlds.push(self.with(|w| {
                (w.image.offer, w.image.go, w.image.said) = (false, false, Said::Nothing);
                w.service = Service::Put;
            })),
            Service::Put => worlds.push(self.with(|w| {
                let queued = w.image.status == Status::Queued;
                if queued {
                    w.image.status = Status::Saving;
                }
                w.service = if queued { Service::Create } else { Service::Recheck };
            })),
            Service::Create => worlds.push(self.with(|w| match w.job.name {
                None => (w.job.name, w.service) = (Some(Writer::Service), Service::Complete),
                Some(_) => {
                    if !w.doubted {
                        w.broken = Some("the upload meets the daemon's image without a doubt");
                    }
                    (w.image.status, w.service) = (Status::Queued, Service::Recheck);
                }
            })),
            Service::Complete => worlds.push(self.with(|w| {
                (w.image.status, w.service) = (Status::Active(Writer::Service), Service::Done);
            })),
            // the service deletes the record of an upload that failed
            Service::Recheck => worlds.push(self.with(|w| {
                w.service = match w.image.status {
                    Status::Active(_) => Service::Done,
                    _ => Service::Raised,
                };
                if w.service == Service::Raised {
                    w.image.status = Status::Gone;
                }
            })),
        }
        worlds
    }

    fn wrong(&self) -> Option<&'static str> {
        if self.broken.is_some() {
            return self.broken;
        }
        if let Status::Active(writer) = self.image.status
            && self.job.name != Some(writer)
        {
            return Some("the image is active and its data is gone, or another's");
        }
        let waits = matches!(self.service, Service::Read | Service::Decide(_));
        let unheard = self.image.status == Status::Queued && self.image.said != Said::Declined;
        // a daemon that was frozen may take the tag off late: then the service cannot know the outcome
        let ended = self.job.stage == Stage::Ended && self.job.takeovers == 0;
        if ended && self.has_commit_tag && waits && unheard {
            return Some("the daemon ended it without a word after go");
        }
        if self.service == Service::Done && !matches!(self.image.status, Status::Active(_)) {
            return Some("the service believes in an image that is not active");
        }
        None
    }

    /// What must hold when neither the service nor a daemon can make another step.
    fn wrong_at_the_end(&self) -> Option<&'static str> {
        let daemon_left = self.job.stage == Stage::Ended;
        if daemon_left && self.job.copy {
            return Some("the private copy is left");
        }
        if daemon_left && self.job.name == Some(Writer::Daemon) && self.image.status != Status::Active(Writer::Daemon) {
            return Some("the published copy is left without an image");
        }
        let ended = matches!(self.service, Service::Done | Service::Raised);
        if ended && !self.doubted && !matches!(self.image.status, Status::Active(_)) {
            return Some("the tenant's image was lost");
        }
        None
    }
}

#[derive(Debug, Default)]
struct Walk {
    worlds: usize,
    made_by_daemon: usize,
    made_by_service: usize,
    doubted: usize,
    wrong: Option<(&'static str, Vec<String>)>,
}

/// Walks every world that can be reached, until one is wrong.
fn walk(fault: Fault) -> Walk {
    let mut result = Walk::default();
    let mut seen = HashSet::from([World::begin()]);
    let mut came_by = vec![(World::begin(), 0, String::new())];
    let mut at = 0;
    while at < came_by.len() {
        let world = came_by[at].0;
        let next = world.next(fault);
        let ended = !next.iter().any(|(_, next)| !is_a_death(&world, next));
        result.worlds += 1;
        result.doubted += usize::from(world.doubted);
        if ended {
            result.made_by_daemon += usize::from(world.image.status == Status::Active(Writer::Daemon));
            result.made_by_service += usize::from(world.image.status == Status::Active(Writer::Service));
        }
        if let Some(wrong) = world.wrong().or_else(|| ended.then(|| world.wrong_at_the_end()).flatten()) {
            let mut steps = Vec::new();
            let mut back = at;
            while back != 0 {
                steps.push(came_by[back].2.clone());
                back = came_by[back].1;
            }
            steps.reverse();
            result.wrong = Some((wrong, steps));
            return result;
        }
        for (step, next) in next {
            if seen.insert(next) {
                came_by.push((next, at, step));
            }
        }
        at += 1;
    }
    result
}

/// Dying is always possible, and is not what the others wait for.
fn is_a_death(before: &World, after: &World) -> bool {
    after.service == Service::Dead && before.service != Service::Dead
        || (0..2).any(|n| after.daemons[n] == Daemon::Dead && before.daemons[n] != Daemon::Dead)
}

#[test]
fn the_image_is_made_by_exactly_one_in_every_interleaving() {
    let walk = walk(Fault::None);
    assert_eq!(walk.wrong, None, "{:#?}", walk.wrong);
    println!("{walk:?}");
    // the walk went everywhere
    assert!(walk.worlds > 10_000 && walk.made_by_daemon > 0 && walk.made_by_service > 0 && walk.doubted > 0);
}

#[test]
fn each_planted_fault_is_found() {
    for fault in [
        Fault::PublishesWithoutGo,
        Fault::TellsBeforeItTookDown,
        Fault::FallsBackAfterGo,
        Fault::TakesGoForDone,
        Fault::ForgetsGo,
        Fault::NoFence,
        Fault::OverwritesTheName,
    ] {
        let found = walk(fault).wrong;
        println!("{fault:?}: {found:#?}");
        assert!(found.is_some(), "{fault:?} does no harm: is what it leaves out needed?");
    }
}
