package powercut

import (
	"errors"
	"io"
	"math/rand/v2"
	"net/rpc"
	"os"
	"os/exec"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
)

// Another process serves the disk. In the process that uses the registry, a thread can wait for
// the disk in a page fault, in memory that SQLite maps. The Go runtime cannot stop that thread, so
// a garbage collection that begins would stop all others and wait for it. Among them would be the
// ones that serve the disk, and nothing would ever go on.
//
// The process ends when its standard input does, so also after a kill of the test. The kernel then
// fails what it still asks of the disk.

// A diskProcess is a disk in another process. Its methods can be called by several goroutines.
type diskProcess struct {
	cmd    *exec.Cmd
	client *rpc.Client
}

// startDisk starts cmd, which must call [serveDisk] in a new process, and has it serve a disk with
// the bytes of the file image below the directory dir.
func startDisk(cmd *exec.Cmd, image, dir string) (*diskProcess, error) {
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt of the test must not end it first
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &diskProcess{cmd, rpc.NewClient(pipes{out, in})}
	if err := p.client.Call("Disk.Mount", MountArgs{image, dir}, new(bool)); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

// stop unmounts the disk's file system and ends the process.
func (p *diskProcess) stop() error {
	err := p.client.Call("Disk.Unmount", true, new(bool))
	return errors.Join(err, p.client.Close(), p.cmd.Wait())
}

// mark returns the present length of the disk's log: a moment.
func (p *diskProcess) mark() (n int, err error) {
	err = p.client.Call("Disk.Mark", true, &n)
	return n, err
}

// cut writes a disk whose power failed at a moment to a file. seed decides what the disk kept.
func (p *diskProcess) cut(moment int, seed uint64, file string) error {
	return p.client.Call("Disk.Cut", CutArgs{moment, seed, file}, new(bool))
}

// serveDisk serves one disk, as standard input asks, until that ends.
func serveDisk() {
	server := rpc.NewServer()
	if err := server.RegisterName("Disk", &diskCalls{}); err != nil {
		panic(err)
	}
	server.ServeConn(pipes{os.Stdin, os.Stdout})
}

// pipes are the two halves of a connection.
type pipes struct {
	io.ReadCloser
	io.WriteCloser
}

func (p pipes) Close() error { return errors.Join(p.WriteCloser.Close(), p.ReadCloser.Close()) }

// MountArgs and CutArgs are arguments of calls. The package rpc wants exported names.
type (
	MountArgs struct{ Image, Dir string }
	CutArgs   struct {
		Moment int
		Seed   uint64
		File   string
	}
)

// diskCalls are the calls of a disk's process. The results of most are not used.
type diskCalls struct {
	disk    *disk
	unmount func() error
}

// Mount mounts the file system.
func (c *diskCalls) Mount(args MountArgs, _ *bool) error {
	image, err := os.ReadFile(args.Image)
	if err != nil {
		return err
	}
	c.disk = newDisk(image)
	opts := &fusefs.Options{}
	opts.DirectMount = true
	opts.MaxWrite = 1 << 20
	server, err := fusefs.Mount(args.Dir, &directory{disk: c.disk}, opts)
	if err == nil {
		c.unmount = server.Unmount
	}
	return err
}

// Unmount unmounts it, if it is mounted. Nothing may use it any more.
func (c *diskCalls) Unmount(_ bool, _ *bool) error {
	if c.unmount == nil {
		return nil
	}
	return c.unmount()
}

// Mark returns the length of the log.
func (c *diskCalls) Mark(_ bool, n *int) error {
	*n = c.disk.mark()
	return nil
}

// Cut writes what [disk.cut] returns.
func (c *diskCalls) Cut(args CutArgs, _ *bool) error {
	return os.WriteFile(args.File, c.disk.cut(args.Moment, rand.New(rand.NewPCG(args.Seed, 0))), 0o600)
}
