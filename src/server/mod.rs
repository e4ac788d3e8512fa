//! The NBD server of one volume: sessions, commands, memory budget, extents, control socket.
