//! A way to a service that can be shut or frozen.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Connections end, and new ones do not get far.
    Shut,
    /// Connections stay and new ones are accepted, and nothing passes.
    Frozen,
    /// Requests pass, and answers do not.
    Mute,
}

pub struct TcpProxy {
    pub port: u16,
    state: watch::Sender<State>,
}

impl TcpProxy {
    /// An open way to this port.
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let (sender, state) = watch::channel(State::Open);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let mut state = state.clone();
                tokio::spawn(async move {
                    if *state.borrow() == State::Shut {
                        return;
                    }
                    let Ok(far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                    tokio::select! {
                        () = pass(near_read, far_write, state.clone(), &[State::Frozen]) => {}
                        () = pass(far_read, near_write, state.clone(), &[State::Frozen, State::Mute]) => {}
                        _ = state.wait_for(|state| *state == State::Shut) => {}
                    }
                });
            }
        });
        Self { port: own, state: sender }
    }

    pub fn shut(&self) {
        self.state.send_replace(State::Shut);
    }

    pub fn freeze(&self) {
        self.state.send_replace(State::Frozen);
    }

    pub fn hold_answers(&self) {
        self.state.send_replace(State::Mute);
    }

    pub fn open(&self) {
        self.state.send_replace(State::Open);
    }
}

/// Hands on what comes, but in these states, until the connection ends.
async fn pass(
    mut from: impl AsyncReadExt + Unpin + Send,
    mut to: impl AsyncWriteExt + Unpin + Send,
    mut state: watch::Receiver<State>,
    held_in: &[State],
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let open = state.wait_for(|state| !held_in.contains(state)).await.is_ok();
        if !open || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
