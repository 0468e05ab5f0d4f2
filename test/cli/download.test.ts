import { existsSync } from 'node:fs';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PassThrough } from 'node:stream';
import { Command } from 'commander';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { addDownload, createTransferProgress } from '../../src/cli/download.ts';
import { MmditxError } from '../../src/errors.ts';
import { DEFAULT_REPO } from '../../src/weights/download.node.ts';
import { COMMIT, sha256, startHub, type TestHub } from '../support/hub-server.ts';

const FILES = {
  'sd3.5_medium.safetensors': 'checkpoint',
  'text_encoders/clip_l.safetensors': 'l',
  'text_encoders/clip_g.safetensors': 'g',
  'text_encoders/t5xxl_fp16.safetensors': 't5',
  'tokenizer/vocab.json': '{}',
  'tokenizer/merges.txt': '',
  'tokenizer_3/tokenizer.json': '[]',
};

let folder: string;
let hub: TestHub;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx download '));
  const card = { license: 'other', license_name: 'stabilityai-ai-community' };
  hub = await startHub({ [DEFAULT_REPO]: { files: FILES, card }, 'a/b': { files: { 'a.bin': 'a' } } });
});
afterEach(async () => {
  await hub.close();
  await rm(folder, { recursive: true, force: true });
});

interface Run {
  readonly isTTY?: boolean;
  /** What is typed; `null` is the end of the input. */
  readonly typed?: string | null;
  readonly environment?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal;
}

/** Runs the command; an error it ends with is given back. */
async function run(argv: readonly string[], { isTTY = false, typed, environment, signal }: Run = {}) {
  const stream = () => Object.assign(new PassThrough(), { isTTY });
  const [stdin, stdout, stderr] = [stream(), stream(), stream()];
  if (typed === null) stdin.end();
  else if (typed !== undefined) stdin.write(`${typed}\n`);
  const program = new Command().exitOverride().configureOutput({ writeErr: () => undefined });
  const context = {
    stdout,
    stderr,
    environment: { HF_HOME: folder, HF_ENDPOINT: hub.url, ...environment },
    signal: signal ?? new AbortController().signal,
  };
  addDownload(program, context, stdin);
  const error = await program.parseAsync(['download', ...argv], { from: 'user' }).then(
    () => undefined,
    (reason: unknown) => reason,
  );
  return { error, stdout: String(stdout.read() ?? ''), stderr: String(stderr.read() ?? '') };
}

const snapshot = () => join(folder, 'hub', `models--${DEFAULT_REPO.replace('/', '--')}`, 'snapshots', COMMIT);

describe('mmditx download', () => {
  it('prints the folder, and on the side the licence, the plan and the command that draws', async () => {
    const { error, stdout, stderr } = await run(['--yes']);
    expect(error).toBeUndefined();
    expect(stdout).toBe(`${snapshot()}\n`);
    const [licence, plan, , command] = stderr.split('\n');
    expect(licence).toMatch(/Stability AI Community License: free for research.*US\$ 1M.*community-license-agreement/);
    expect(plan).toBe(`To fetch: 7 of 7 files, 18 bytes, into ${join(folder, 'hub')}`);
    const paths = ['sd3.5_medium', 'text_encoders/clip_l', 'text_encoders/clip_g', 'text_encoders/t5xxl_fp16'].map(
      (name) => `--model '${join(snapshot(), `${name}.safetensors`)}'`,
    );
    expect(command).toBe(`  mmditx generate "a red fox in the snow" ${paths.join(' ')}`);
  });

  it('does the same for what is in the cache, without asking', async () => {
    const first = await run(['--yes']);
    expect(await run([])).toMatchObject({ error: undefined, stdout: first.stdout });
    const offline = await run([], { environment: { HF_HUB_OFFLINE: '1' } });
    expect(offline).toEqual({
      error: undefined,
      stdout: first.stdout,
      stderr: expect.stringMatching(/^Draw with it:/),
    });
  });

  it('takes other files of other models, and tells what shows what they are', async () => {
    const { error, stderr } = await run([
      DEFAULT_REPO,
      '--include',
      '*.safetensors',
      '--include',
      'tokenizer/*',
      '--yes',
    ]);
    expect(error).toBeUndefined();
    expect(await readdir(snapshot())).toEqual(['sd3.5_medium.safetensors', 'tokenizer']);
    expect(stderr).toMatch(/\n {2}mmditx inspect '.*sd3\.5_medium\.safetensors'\n$/);
    const other = await run(['a/b', '--include', '*', '--yes', '--cache', join(folder, 'other')]);
    expect(other.stdout).toBe(`${join(folder, 'other/models--a--b/snapshots', COMMIT)}\n`);
    expect(other.stderr).toMatch(/^a\/b names no licence.*\nTo fetch: 1 of 1 files, 1 bytes, into .*other\n$/);
  });

  it('hands its options on', async () => {
    const { error } = await run(
      ['--t5', 'none', '--revision', COMMIT, '--token', 'hf_x', '--endpoint', hub.url, '--yes'],
      {
        environment: { HF_ENDPOINT: 'http://127.0.0.1:1' },
      },
    );
    expect(error).toBeUndefined();
    expect(hub.requests[0]).toMatchObject({ token: 'hf_x', path: expect.stringContaining(`/revision/${COMMIT}?`) });
    expect(existsSync(join(snapshot(), 'tokenizer_3'))).toBe(false);
  });

  it('ends with the reason when it is stopped', async () => {
    const stop = new AbortController();
    hub.faults.push({ path: new RegExp(sha256('checkpoint')), stallAfter: 5 });
    setTimeout(() => stop.abort(), 200);
    const { error, stdout } = await run(['--yes'], { signal: stop.signal });
    expect(error).toBe(stop.signal.reason);
    expect(stdout).toBe('');
  });

  it.each([
    [['--t5', 'fp4'], /fp4/],
    [['--t5', 'fp8', '--include', '*'], /include/],
    [['--colour'], /--colour/],
  ])('wrong usage: %j', async (argv, message) => {
    expect((await run(argv)).error).toMatchObject({ message: expect.stringMatching(message) });
    expect(hub.requests).toEqual([]);
  });
});

describe('the licence', () => {
  it('has to be accepted with --yes where there is no terminal', async () => {
    const { error, stderr } = await run([]);
    expect(error).toBeInstanceOf(MmditxError);
    expect(error).toMatchObject({
      code: 'bad-option',
      message: expect.stringMatching(/^Nothing was fetched: .*--yes\.$/),
    });
    expect(stderr).toContain('Stability AI Community License');
    expect(await readdir(folder)).toEqual([]);
  });

  it.each(['y', 'Yes', ' yes '])('is accepted by typing %j', async (typed) => {
    const { error, stderr } = await run(['--quiet'], { isTTY: true, typed });
    expect(error).toBeUndefined();
    expect(stderr).toContain('Do you accept the licence');
    expect(existsSync(snapshot())).toBe(true);
  });

  it.each(['', 'n', 'yesterday', null])('is not accepted by typing %j', async (typed) => {
    const { error } = await run([], { isTTY: true, typed });
    expect(error).toMatchObject({
      code: 'bad-option',
      message: expect.stringMatching(/^Nothing was fetched, .*not accepted\.$/),
    });
    expect(await readdir(folder)).toEqual([]);
  });

  it('can be thought about until Ctrl-C', async () => {
    const stop = new AbortController();
    setTimeout(() => stop.abort(), 200);
    expect((await run([], { isTTY: true, signal: stop.signal })).error).toBe(stop.signal.reason);
  });
});

describe('progress', () => {
  function setUp(isTTY: boolean, quiet = false) {
    const stream = Object.assign(new PassThrough(), { isTTY, columns: 100 });
    let time = 0;
    const progress = createTransferProgress(stream, quiet, () => time);
    const at = (seconds: number, done: number, fetched = done) => {
      time = seconds * 1000;
      progress.update({ file: 'a', done, total: 2_000_000, fetched });
    };
    return { progress, at, text: () => String(stream.read() ?? '') };
  }

  it('is a bar with bytes, rate and time left, taken away at the end', () => {
    const { progress, at, text } = setUp(true);
    at(0, 0);
    expect(text()).toMatch(/ 0 bytes of 2\.0 MB/);
    at(4, 500_000);
    progress.stop();
    expect(text()).toMatch(/ 500\.0 kB of 2\.0 MB {2}125\.0 kB\/s, 0:12 left/);
    progress.stop();
    expect(text()).toBe('');
  });

  it('has the rate of the last seconds, without the bytes of an earlier run', () => {
    const { progress, at, text } = setUp(true);
    at(0, 1_000_000, 0);
    for (let second = 1; second <= 40; second++) at(second, 1_000_000 + second * 100, second * 100);
    for (let second = 41; second <= 60; second++)
      at(second, 1_004_000 + (second - 40) * 5000, 4000 + (second - 40) * 5000);
    progress.stop();
    expect(text()).toMatch(/1\.1 MB of 2\.0 MB {2}5\.0 kB\/s, 3:00 left/);
  });

  it('is a line now and then where there is no terminal, and nothing when quiet', () => {
    const { at, text } = setUp(false);
    at(0, 0);
    at(9, 100_000);
    expect(text()).toBe('');
    at(10, 200_000);
    expect(text()).toBe('200.0 kB of 2.0 MB, 20.0 kB/s, 1:30 left\n');
    at(11, 300_000);
    expect(text()).toBe('');
    const quiet = setUp(true, true);
    quiet.at(0, 1);
    quiet.progress.say('note');
    expect(quiet.text()).toBe('note\n');
  });

  it('makes room for a note', () => {
    const { progress, at, text } = setUp(true);
    at(0, 100);
    text();
    progress.say('trying again');
    expect(text()).toMatch(/trying again\n$/);
    at(1, 200);
    expect(text()).toMatch(/200 bytes/);
    progress.stop();
  });
});
