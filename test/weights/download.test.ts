import { existsSync } from 'node:fs';
import type * as FileSystem from 'node:fs/promises';
import { lstat, mkdir, mkdtemp, readdir, readFile, readlink, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import {
  DEFAULT_REPO,
  type DownloadOptions,
  type DownloadPlan,
  type DownloadProgress,
  downloadModel,
} from '../../src/weights/download.node.ts';
import {
  COMMIT,
  GOOD_TOKEN,
  gitSha1,
  type HubModel,
  type SeenRequest,
  sha256,
  startHub,
  type TestHub,
} from '../support/hub-server.ts';

/** Failures of the file system that a test asks for, by the name of the function. */
const failing = vi.hoisted(() => new Map<string, string>());
vi.mock('node:fs/promises', async (original) => {
  const real = await original<typeof FileSystem>();
  const fail = (name: string) => {
    const code = failing.get(name);
    if (code) throw Object.assign(new Error(`${code}: ${name}`), { code });
  };
  const symlink: typeof real.symlink = async (...args) => {
    fail('symlink');
    await real.symlink(...args);
  };
  const link: typeof real.link = async (...args) => {
    fail('link');
    await real.link(...args);
  };
  const open: typeof real.open = async (...args) => {
    const handle = await real.open(...args);
    const { write } = handle;
    const failingWrite: typeof write = ((...writeArgs: Parameters<typeof write>) => {
      fail('write');
      return write.apply(handle, writeArgs);
    }) as typeof write;
    return Object.assign(handle, { write: failingWrite });
  };
  return { ...real, symlink, link, open };
});

/** Bytes that are the same at every run and nowhere the same. */
function content(length: number, seed: number): Uint8Array {
  let state = seed;
  return Uint8Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state >>> 24;
  });
}

const CHECKPOINT = content(300_000, 1);
const T5 = content(100_000, 2);
const FILES = {
  'README.md': '# A model',
  'sd3.5_medium.safetensors': CHECKPOINT,
  'text_encoders/clip_l.safetensors': content(2000, 3),
  'text_encoders/clip_g.safetensors': content(3000, 4),
  'text_encoders/t5xxl_fp16.safetensors': T5,
  'text_encoders/t5xxl_fp8_e4m3fn.safetensors': content(50_000, 5),
  'tokenizer/vocab.json': '{"a": 0}',
  'tokenizer/merges.txt': '#version: 0.2\n',
  'tokenizer/special_tokens_map.json': '{}',
  'tokenizer_3/tokenizer.json': '{"t5": true}',
  'vae/config.json': '{}',
  'vae/diffusion_pytorch_model.safetensors': content(500, 6),
};
const DEFAULT_FILES = [
  'sd3.5_medium.safetensors',
  'text_encoders/clip_l.safetensors',
  'text_encoders/clip_g.safetensors',
  'tokenizer/vocab.json',
  'tokenizer/merges.txt',
  'text_encoders/t5xxl_fp16.safetensors',
  'tokenizer_3/tokenizer.json',
];
const STABILITY_CARD = { license: 'other', license_name: 'stabilityai-ai-community', license_link: 'LICENSE.md' };

let folder: string;
let cache: string;
let hub: TestHub;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-hub-'));
  cache = join(folder, 'hub');
  hub = await startHub({ [DEFAULT_REPO]: { files: FILES, card: STABILITY_CARD } });
});
afterEach(async () => {
  failing.clear();
  await hub.close();
  await rm(folder, { recursive: true, force: true });
});

const notes: string[] = [];
function download(options: DownloadOptions = {}) {
  notes.length = 0;
  return downloadModel({
    cache,
    endpoint: hub.url,
    environment: { HF_HOME: folder },
    retries: { delay: 1 },
    onNote: (text) => notes.push(text),
    ...options,
  });
}

/** One small file: what most failures are tried with. */
const one = { include: ['sd3.5_medium.safetensors'] };

async function refusal(promise: Promise<unknown>): Promise<{ code: string; message: string }> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof MmditxError)) throw error ?? new Error('It was not refused.');
  // One sentence.
  expect(error.message).toMatch(/^[^\n]+\.$/);
  return { code: error.code, message: error.message };
}

const repoFolder = (repo = DEFAULT_REPO) => join(cache, `models--${repo.replace('/', '--')}`);
const blob = (data: string | Uint8Array) => join(repoFolder(), 'blobs', sha256(data));
const partial = (data: string | Uint8Array) => `${blob(data)}.mmditx.incomplete`;
const fileRequests = () => hub.requests.filter(({ path, files }) => files || path.includes('/resolve/'));
const checkpointRanges = () =>
  hub.requests
    .filter(({ path, files }: SeenRequest) => files && path.includes(sha256(CHECKPOINT)))
    .map(({ range }) => range);

async function leavePartial(bytes: Uint8Array): Promise<void> {
  await mkdir(join(repoFolder(), 'blobs'), { recursive: true });
  await writeFile(partial(CHECKPOINT), bytes);
}

describe('a download', () => {
  it('has what the package draws with, under the names of the repository', async () => {
    const { folder: snapshot, files } = await download();
    expect(snapshot).toBe(join(repoFolder(), 'snapshots', COMMIT));
    expect(files.map(({ name }) => name)).toEqual(DEFAULT_FILES);
    for (const { name, path, size } of files) {
      const expected = Buffer.from(FILES[name as keyof typeof FILES]);
      expect(path).toBe(join(snapshot, name));
      expect(size).toBe(expected.length);
      expect(expected.equals(await readFile(path))).toBe(true);
    }
    expect((await readdir(snapshot)).sort()).toEqual([
      'sd3.5_medium.safetensors',
      'text_encoders',
      'tokenizer',
      'tokenizer_3',
    ]);
  });

  it("lies in the cache as Hugging Face's tools lay it out", async () => {
    const { folder: snapshot } = await download();
    expect((await readdir(repoFolder())).sort()).toEqual(['blobs', 'refs', 'snapshots']);
    expect(await readFile(join(repoFolder(), 'refs/main'), 'utf8')).toBe(COMMIT);
    // Large files by SHA-256, the others by git's hash; links are relative.
    expect(await readlink(join(snapshot, 'sd3.5_medium.safetensors'))).toBe(`../../blobs/${sha256(CHECKPOINT)}`);
    expect(await readlink(join(snapshot, 'tokenizer/vocab.json'))).toBe(`../../../blobs/${gitSha1('{"a": 0}')}`);
    expect(await readdir(join(repoFolder(), 'blobs'))).toHaveLength(DEFAULT_FILES.length);
  });

  it.each([
    ['fp8', 'text_encoders/t5xxl_fp8_e4m3fn.safetensors', true],
    ['none', undefined, false],
  ] as const)('with T5 in %s', async (t5, encoder, tokenizer) => {
    const names = (await download({ t5 })).files.map(({ name }) => name);
    expect(names.filter((name) => name.includes('t5xxl'))).toEqual(encoder ? [encoder] : []);
    expect(names.includes('tokenizer_3/tokenizer.json')).toBe(tokenizer);
  });

  it('prefers a tokenizer.json for CLIP', async () => {
    hub.models[DEFAULT_REPO] = { files: { ...FILES, 'tokenizer/tokenizer.json': '{}' } };
    const names = (await download({ t5: 'none' })).files.map(({ name }) => name);
    expect(names.filter((name) => name.startsWith('tokenizer'))).toEqual(['tokenizer/tokenizer.json']);
  });

  it.each([
    [['vae/*'], ['vae/config.json', 'vae/diffusion_pytorch_model.safetensors']],
    [['vae/'], ['vae/config.json', 'vae/diffusion_pytorch_model.safetensors']],
    [['*.safetensors'], ['sd3.5_medium.safetensors']],
    [['**/*.md', 'README.md'], ['README.md']],
    [['**/t5xxl_fp?.safetensors'], undefined],
    [
      ['**/config.json', 'tokenizer_?/**'],
      ['vae/config.json', 'tokenizer_3/tokenizer.json'],
    ],
    [['sd3x5_medium.safetensors'], undefined],
  ])('takes the files of %j', async (include, expected) => {
    const result = download({ include });
    if (expected) expect((await result).files.map(({ name }) => name)).toEqual(expected);
    else
      expect(await refusal(result)).toMatchObject({
        code: 'missing-part',
        message: expect.stringContaining(include[0]!),
      });
  });

  it('fetches nothing that is in the cache', async () => {
    await download({ include: ['tokenizer/*'] });
    hub.requests.length = 0;
    let plan: DownloadPlan | undefined;
    await download({
      confirm: (given) => {
        plan = given;
      },
    });
    expect(fileRequests().some(({ path }) => path.includes('tokenizer/'))).toBe(false);
    expect(plan?.files.filter(({ cached }) => cached).map(({ name }) => name)).toEqual([
      'tokenizer/vocab.json',
      'tokenizer/merges.txt',
    ]);
    hub.requests.length = 0;
    await download({ confirm: ({ bytes }) => expect(bytes).toBe(0) });
    expect(fileRequests()).toEqual([]);
  });

  it('shares contents with other commits, and with equal files', async () => {
    const commit = 'd'.repeat(40);
    await download(one);
    const files = { 'new.safetensors': CHECKPOINT, 'copy.safetensors': CHECKPOINT, 'other.safetensors': T5 };
    hub.models[DEFAULT_REPO] = { files, commit };
    hub.requests.length = 0;
    const { folder: snapshot } = await download({ include: ['*'] });
    expect(hub.requests.filter((request) => request.files)).toHaveLength(1);
    expect(await readlink(join(snapshot, 'copy.safetensors'))).toBe(`../../blobs/${sha256(CHECKPOINT)}`);
    expect((await readdir(join(repoFolder(), 'snapshots'))).sort()).toEqual([COMMIT, commit]);
    expect(await readFile(join(repoFolder(), 'refs/main'), 'utf8')).toBe(commit);
  });

  it('of a commit writes no branch', async () => {
    await download({ ...one, revision: COMMIT });
    expect(existsSync(join(repoFolder(), 'refs'))).toBe(false);
    expect((await download({ ...one, revision: COMMIT, offline: true })).files).toHaveLength(1);
  });

  it('replaces a file in the cache that is cut, and a link that leads nowhere', async () => {
    const { files } = await download(one);
    await writeFile(blob(CHECKPOINT), CHECKPOINT.subarray(0, 10));
    await download(one);
    expect((await stat(files[0]!.path)).size).toBe(CHECKPOINT.length);
    await rm(blob(CHECKPOINT));
    await download(one);
    expect((await stat(files[0]!.path)).size).toBe(CHECKPOINT.length);
  });

  it('reports bytes, up to the last', async () => {
    const progress: DownloadProgress[] = [];
    await download({ onProgress: (event) => progress.push(event) });
    const total = DEFAULT_FILES.reduce((sum, name) => sum + FILES[name as keyof typeof FILES].length, 0);
    expect(progress.every((event, i) => i === 0 || event.done >= progress[i - 1]!.done)).toBe(true);
    expect(progress.at(-1)).toEqual({ file: 'tokenizer_3/tokenizer.json', done: total, total, fetched: total });
  });

  it('gives an empty file', async () => {
    hub.models[DEFAULT_REPO] = { files: { empty: '' } };
    expect((await stat((await download({ include: ['empty'] })).files[0]!.path)).size).toBe(0);
  });

  it.each([['symlink'], ['symlink', 'link']])('works where the file system refuses %s', async (...functions) => {
    for (const name of functions) failing.set(name, 'EPERM');
    const { files } = await download(one);
    const status = await lstat(files[0]!.path);
    expect({ link: status.isSymbolicLink(), names: status.nlink }).toEqual({
      link: false,
      names: 3 - functions.length,
    });
    expect((await download({ ...one, confirm: ({ bytes }) => expect(bytes).toBe(0) })).files).toEqual(files);
  });

  it('may run twice at the same time', async () => {
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), breakAfter: 100_000 });
    const [a, b] = await Promise.all([download(one), download(one)]);
    expect(a).toEqual(b);
    expect(CHECKPOINT).toEqual(new Uint8Array(await readFile(a.files[0]!.path)));
    expect(await readdir(join(repoFolder(), 'blobs'))).toEqual([sha256(CHECKPOINT)]);
  });
});

describe('a broken connection', () => {
  it('is resumed where it broke off', async () => {
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), breakAfter: 100_000 });
    const { files } = await download(one);
    const [first, second] = checkpointRanges();
    expect(first).toBeUndefined();
    expect(second).toMatch(/^bytes=\d+-$/);
    expect(Number(/\d+/.exec(second!)![0])).toBeGreaterThan(0);
    expect(Buffer.from(CHECKPOINT).equals(await readFile(files[0]!.path))).toBe(true);
    expect(notes).toEqual([
      expect.stringMatching(/^The connection to .* failed .*; trying again in 1 s \(try 2 of 5\)\.$/),
    ]);
  });

  it.each([
    ['ignores ranges', { ignoreRange: true }, []],
    ['answers with another range', { shiftRange: 50 }, [/^The server sent another piece .*; trying again/]],
  ])('is resumed at a server that %s', async (_, fault, expected) => {
    await leavePartial(CHECKPOINT.subarray(0, 100_000));
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), ...fault });
    const { files } = await download(one);
    expect(Buffer.from(CHECKPOINT).equals(await readFile(files[0]!.path))).toBe(true);
    expect(notes).toEqual(expected.map((note) => expect.stringMatching(note)));
  });

  it('is no slow one', async () => {
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), dribble: 150 });
    expect((await download({ ...one, retries: { delay: 1, stall: 600 } })).files).toHaveLength(1);
    expect(notes).toEqual([]);
  });

  it('that stays broken ends in one sentence, and what has arrived stays', async () => {
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), breakAfter: 10_000, times: Number.POSITIVE_INFINITY });
    expect(await refusal(download({ ...one, retries: { tries: 3, delay: 1 } }))).toEqual({
      code: 'io',
      message: expect.stringMatching(/^The connection to http.* failed \(.*\); check the network .*\.$/),
    });
    expect(checkpointRanges()).toHaveLength(3);
    const { size } = await stat(partial(CHECKPOINT));
    expect(size).toBeGreaterThan(0);
    hub.faults.length = 0;
    await download({ ...one, onProgress: ({ done, fetched }) => expect(done - fetched).toBe(size) });
    expect(checkpointRanges().at(-1)).toBe(`bytes=${size}-`);
    expect(await readdir(join(repoFolder(), 'blobs'))).toEqual([sha256(CHECKPOINT)]);
  });

  it('counts anew after a piece of a megabyte', async () => {
    const large = content(2_500_000, 7);
    hub.models[DEFAULT_REPO] = { files: { 'large.safetensors': large } };
    hub.faults.push({ path: new RegExp(sha256(large)), breakAfter: 1_200_000, times: 2 });
    expect((await download({ include: ['*'], retries: { tries: 2, delay: 1 } })).files).toHaveLength(1);
  });

  it('shows when nothing comes any more', async () => {
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), stallAfter: 5000 });
    hub.faults.push({ path: /\/tree\//, stallAfter: 5 });
    await download({ ...one, retries: { delay: 1, stall: 400 } });
    expect(notes).toEqual([0, 1].map(() => expect.stringContaining('no data for 1 s')));
  });

  it.each([/\/revision\//, /\/tree\//])('in the listing is mended, too: %s', async (path) => {
    hub.faults.push({ path, breakAfter: 10 });
    expect((await download(one)).files).toHaveLength(1);
  });

  it('to a hub that is not there is told', async () => {
    await hub.close();
    const { code, message } = await refusal(download({ retries: { tries: 2, delay: 1 } }));
    expect(code).toBe('io');
    expect(message).toMatch(/ECONNREFUSED.*check the network/);
    expect(existsSync(cache)).toBe(false);
  });
});

describe('a damaged file', () => {
  it('is fetched once more', async () => {
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), corrupt: true });
    const { files } = await download(one);
    expect(Buffer.from(CHECKPOINT).equals(await readFile(files[0]!.path))).toBe(true);
    expect(notes).toEqual(['"sd3.5_medium.safetensors" arrived damaged; fetching it once more.']);
    // From its beginning.
    expect(checkpointRanges()).toEqual([undefined, undefined]);
  });

  it.each([
    ['a large one', 'sd3.5_medium.safetensors', sha256(CHECKPOINT), new RegExp(sha256(CHECKPOINT))],
    ['a small one', 'tokenizer/vocab.json', gitSha1('{"a": 0}'), /\/resolve\//],
  ])('is refused when it stays damaged, and leaves nothing: %s', async (_, name, hash, path) => {
    hub.faults.push({ path, corrupt: true, times: 2 });
    expect(await refusal(download({ include: [name] }))).toEqual({
      code: 'bad-file',
      message: expect.stringMatching(
        new RegExp(`"${name}" of ${DEFAULT_REPO} arrived damaged 2 times .*${hash}.*; try`),
      ),
    });
    expect(await readdir(join(repoFolder(), 'blobs'))).toEqual([]);
    expect(existsSync(join(repoFolder(), 'snapshots'))).toBe(false);
    expect(existsSync(join(repoFolder(), 'refs'))).toBe(false);
  });

  it.each([
    ['other bytes', Uint8Array.from(CHECKPOINT.subarray(0, 1000), (byte) => byte ^ 1)],
    ['other bytes to its end', CHECKPOINT.map((byte) => byte ^ 1)],
    ['too many bytes', content(CHECKPOINT.length + 5, 8)],
    ['bytes after its end', Buffer.concat([CHECKPOINT, Buffer.of(1, 2, 3)])],
  ])('that an earlier run has left is not kept: %s', async (_, bytes) => {
    await leavePartial(bytes);
    const { files } = await download(one);
    expect(Buffer.from(CHECKPOINT).equals(await readFile(files[0]!.path))).toBe(true);
  });

  it('that is complete but for its name is not fetched again', async () => {
    await leavePartial(CHECKPOINT);
    await download(one);
    expect(checkpointRanges()).toEqual([]);
  });

  it('of another size than the listing has is refused', async () => {
    hub.models[DEFAULT_REPO] = { files: FILES, listed: { 'sd3.5_medium.safetensors': { size: 299_999 } } };
    expect(await refusal(download(one))).toMatchObject({
      code: 'bad-file',
      message: expect.stringMatching(/299999 .*300000/),
    });
  });

  it('that never ends is cut at the size in the listing', async () => {
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), extra: 5_000_000 });
    const { files } = await download(one);
    expect((await stat(files[0]!.path)).size).toBe(CHECKPOINT.length);
    expect(notes).toEqual([]);
  });
});

describe('a hub that refuses', () => {
  const gated: HubModel = { files: FILES, gated: true, card: STABILITY_CARD };

  it('a gated model without a token, with another one, and gives it with the right one', async () => {
    hub.models[DEFAULT_REPO] = gated;
    const page = `${hub.url}/${DEFAULT_REPO}`;
    const without = await refusal(download());
    expect(without.message).toContain(`accept its licence at ${page}, then make a token at ${hub.url}/settings/tokens`);
    const other = await refusal(download({ token: 'hf_other' }));
    expect(other.message).toContain(`open ${page} and accept the licence there`);
    expect(other.message).not.toContain('hf_other');
    expect((await download({ token: GOOD_TOKEN })).files).toHaveLength(DEFAULT_FILES.length);
  });

  it('gives the token to the hub and to no other server', async () => {
    hub.models[DEFAULT_REPO] = gated;
    const other = await startHub({});
    hub.faults.push({ path: /\/tree\//, headers: { Link: `<${other.url}/more>; rel="next"` } });
    other.faults.push({ path: /more/, status: 200, body: '[]' });
    await download({ token: GOOD_TOKEN });
    expect(hub.requests.filter(({ files }) => !files).every(({ token }) => token === GOOD_TOKEN)).toBe(true);
    const elsewhere = [...hub.requests.filter(({ files }) => files), ...other.requests];
    expect(elsewhere.map(({ token }) => token)).toEqual(elsewhere.map(() => undefined));
    expect(other.requests).toHaveLength(1);
    await other.close();
  });

  it.each([
    ['a wrong token', 401, {}, 'hf_wrong', /does not accept the token .*make a new one at/],
    [
      'a model that is not there or private',
      401,
      {},
      undefined,
      /does not exist .*gated or private.*--token or HF_TOKEN/,
    ],
    ['a model that is not there', 404, { 'X-Error-Code': 'RepoNotFound' }, undefined, /There is no model stabilityai/],
    ['a revision', 404, { 'X-Error-Code': 'RevisionNotFound' }, undefined, /no revision "main"/],
    ['anything else', 418, {}, undefined, /refuses .*\(418\)/],
  ])('%s', async (_, status, headers, token, message) => {
    hub.faults.push({ path: /\/revision\//, status, headers });
    const result = await refusal(download({ ...(token && { token }) }));
    expect(result).toEqual({ code: 'io', message: expect.stringMatching(message) });
    expect(hub.requests).toHaveLength(1);
  });

  it('a file that the listing has', async () => {
    hub.faults.push({ path: /\/resolve\//, status: 404, headers: { 'X-Error-Code': 'EntryNotFound' } });
    expect((await refusal(download(one))).message).toMatch(/has no file "sd3.5_medium.safetensors"/);
  });

  it.each([
    ['Retry-After', '0'],
    ['Retry-After', new Date(0).toUTCString()],
    ['RateLimit', '"resolvers";r=0;t=0'],
  ])('for a moment is asked again: %s: %s', async (name, value) => {
    hub.faults.push({ path: /\/resolve\//, status: 429, headers: { [name]: value }, times: 2 });
    expect((await download({ ...one, retries: { delay: 600_000 } })).files).toHaveLength(1);
    expect(notes).toHaveLength(2);
    expect(notes[0]).toMatch(/fewer requests \(429\); trying again in 0 s/);
  });

  it('too many requests, again and again, is told', async () => {
    hub.faults.push({ path: /\/tree\//, status: 429, times: Number.POSITIVE_INFINITY });
    expect((await refusal(download({ retries: { tries: 3, delay: 1 } }))).message).toMatch(
      /asks for fewer requests \(429\); run it again in some minutes, or with a token/,
    );
    expect(hub.requests).toHaveLength(4);
  });

  it('for longer than anyone would wait is told at once', async () => {
    hub.faults.push({ path: /\/tree\//, status: 429, headers: { 'Retry-After': '86400' } });
    expect((await refusal(download())).message).toMatch(/429/);
    expect(hub.requests).toHaveLength(2);
  });

  it('with an error of its own once, is asked again', async () => {
    hub.faults.push({ path: /\/revision\//, status: 500 }, { path: /\/tree\//, status: 503 });
    hub.faults.push({ path: /\/resolve\//, status: 502 }, { path: new RegExp(sha256(CHECKPOINT)), status: 403 });
    expect((await download(one)).files).toHaveLength(1);
    expect(notes).toHaveLength(4);
  });

  it('with an error of its own always, is told', async () => {
    hub.faults.push({ path: /\/resolve\//, status: 500, times: Number.POSITIVE_INFINITY });
    expect((await refusal(download(one))).message).toMatch(/has a problem \(500\); run it again later/);
    expect(fileRequests()).toHaveLength(5);
  });
});

describe('a hub that cannot be trusted', () => {
  it.each([
    '../evil',
    '/etc/evil',
    'a/../../evil',
    'C:\\evil',
    '..\\evil',
    'a//b',
    './a',
    'a\u0000b',
    `${'a/'.repeat(600)}b`,
  ])('gets no file outside the snapshot: %j', async (path) => {
    hub.models[DEFAULT_REPO] = { files: { evil: 'evil' }, listed: { evil: { path } } };
    expect(await refusal(download({ include: ['**'] }))).toMatchObject({ code: 'bad-file' });
    expect(existsSync(cache)).toBe(false);
  });

  it('gets no file through the content of another', async () => {
    hub.models[DEFAULT_REPO] = { files: { a: 'content', b: 'evil' }, listed: { b: { path: 'a/b' } } };
    hub.faults.push({ path: /resolve.*a\/b$/, status: 200, body: 'evil' });
    expect(await refusal(download({ include: ['**'] }))).toMatchObject({ code: 'io' });
  });

  it.each([
    ['no JSON', '<html>'],
    ['no commit', '{"sha": "../../evil"}'],
    ['no object', '[]'],
    ['null', 'null'],
  ])('gives an answer that makes no sense: %s', async (_, body) => {
    hub.faults.push({ path: /\/revision\//, status: 200, body });
    expect(await refusal(download())).toMatchObject({
      code: 'bad-file',
      message: expect.stringContaining('makes no sense'),
    });
  });

  it.each([
    ['a size below zero', { path: 'a', size: -1, oid: '0'.repeat(40) }],
    ['a size beyond all files', { path: 'a', size: 1e300, oid: '0'.repeat(40) }],
    ['a hash that is a path', { path: 'a', size: 1, oid: '../'.repeat(13) }],
    ['no name', { size: 1, oid: '0'.repeat(40) }],
  ])('gives a listing that makes no sense: %s', async (_, entry) => {
    hub.faults.push({ path: /\/tree\//, status: 200, body: JSON.stringify([{ type: 'file', ...entry }]) });
    expect(await refusal(download())).toMatchObject({
      code: 'bad-file',
      message: expect.stringContaining('makes no sense'),
    });
  });

  it('gives an answer without end, or listings in a circle', async () => {
    hub.faults.push({ path: /\/revision\//, extra: 40_000_000 });
    expect((await refusal(download())).message).toMatch(/without end/);
    const next = `<${hub.url}/api/models/${DEFAULT_REPO}/tree/${COMMIT}>; rel="next"`;
    hub.faults.push({ path: /\/tree\//, headers: { Link: next }, times: Number.POSITIVE_INFINITY });
    hub.requests.length = 0;
    expect((await refusal(download())).message).toMatch(/makes no sense/);
    expect(hub.requests.length).toBeLessThanOrEqual(100);
  });
});

describe('the disk', () => {
  it('has to have room before anything is fetched', async () => {
    hub.models[DEFAULT_REPO] = { files: FILES, listed: { 'sd3.5_medium.safetensors': { size: 2 ** 42 } } };
    expect(await refusal(download(one))).toEqual({
      code: 'io',
      message: expect.stringMatching(
        /needs 4\.4 TB, but there are .* free at .*; free some space or choose another folder/,
      ),
    });
    expect(fileRequests()).toEqual([]);
  });

  it('that fills up is told', async () => {
    failing.set('write', 'ENOSPC');
    expect((await refusal(download(one))).message).toMatch(/^Cannot write .*: the disk is full; free some space/);
    expect(checkpointRanges()).toHaveLength(1);
  });

  it('that cannot be written is told', async () => {
    await writeFile(join(folder, 'file'), '');
    expect((await refusal(download({ ...one, cache: join(folder, 'file/hub') }))).message).toMatch(
      /^Cannot write .*file/,
    );
    expect((await refusal(download({ ...one, cache: '/proc/nowhere/hub' }))).message).toMatch(/^Cannot write \/proc/);
  });
});

describe('an abort', () => {
  it('ends the download with its reason and leaves what has arrived', async () => {
    const stop = new AbortController();
    hub.faults.push({ path: new RegExp(sha256(CHECKPOINT)), stallAfter: 150_000 });
    const onProgress = ({ done }: DownloadProgress) => {
      if (done > 100_000) stop.abort(new Error('enough'));
    };
    await expect(download({ ...one, signal: stop.signal, onProgress })).rejects.toThrow('enough');
    const { size } = await stat(partial(CHECKPOINT));
    expect(size).toBeGreaterThan(100_000);
    await download(one);
    expect(checkpointRanges().at(-1)).toBe(`bytes=${size}-`);
  });

  it('ends a pause', async () => {
    const stop = new AbortController();
    hub.faults.push({ path: /\/tree\//, status: 429, headers: { 'Retry-After': '200' } });
    const onNote = () => void setTimeout(() => stop.abort(new Error('enough')), 10);
    await expect(download({ signal: stop.signal, onNote })).rejects.toThrow('enough');
  });

  it('from before ends it at once', async () => {
    await expect(download({ signal: AbortSignal.abort(new Error('never')) })).rejects.toThrow('never');
    expect(hub.requests).toEqual([]);
  });
});

describe('the licence', () => {
  const planOf = async (repo: string, model: HubModel) => {
    hub.models[repo] = model;
    let plan: DownloadPlan | undefined;
    const confirm = (given: DownloadPlan) => {
      plan = given;
      throw new MmditxError('bad-option', 'No.');
    };
    await refusal(download({ repo, include: ['**'], confirm }));
    expect(existsSync(cache)).toBe(false);
    expect(fileRequests()).toEqual([]);
    return plan!;
  };

  it('of Stability AI is told in a sentence', async () => {
    const { licence } = await planOf(DEFAULT_REPO, { files: FILES, gated: true, card: STABILITY_CARD });
    expect(licence).toMatchObject({ gated: true, link: 'https://stability.ai/community-license-agreement' });
    expect(licence.summary).toMatch(
      /free for research.*commercial use by people and organizations with less than US\$ 1M/,
    );
    expect(licence.summary).toContain(`Accept it on the model's page first: ${hub.url}/${DEFAULT_REPO}`);
    const bare = await planOf(DEFAULT_REPO, { files: FILES });
    expect(bare.licence).toMatchObject({ name: 'stabilityai-ai-community', gated: false });
  });

  it.each([
    [{ license: 'apache-2.0' }, 'apache-2.0', '/a/b'],
    [{ license: ['mit', 'apache-2.0'] }, 'mit, apache-2.0', '/a/b'],
    [{ license: 'other', license_name: 'odd', license_link: 'LICENSE.md' }, 'odd', `/a/b/blob/${COMMIT}/LICENSE.md`],
    [{ license: 'other', license_link: 'javascript:alert(1)' }, 'other', '/a/b'],
  ])('of others is the one that the card names: %j', async (card, name, link) => {
    const { licence } = await planOf('a/b', { files: FILES, card });
    expect(licence.name).toBe(name);
    expect(licence.summary).toBe(`a/b is under the licence "${name}" (${hub.url}${link}).`);
  });

  it.each([undefined, {}, { license: 7 }, { license: null }])('may be unknown: %j', async (card) => {
    const { licence } = await planOf('a/b', { files: FILES, ...(card && { card }) });
    expect(licence.summary).toMatch(/names no licence.*\/a\/b/);
  });

  it('cannot write on the terminal', async () => {
    const { licence } = await planOf('a/b', { files: FILES, card: { license: 'mit\u001b[2J\n\u202e' } });
    expect(licence.summary).not.toMatch(/[\p{Cc}\u202e]/u);
  });
});

describe('offline', () => {
  it('takes what the cache has', async () => {
    const online = await download();
    hub.requests.length = 0;
    expect(await download({ offline: true })).toEqual(online);
    expect(await download({ environment: { HF_HUB_OFFLINE: '1' } })).toEqual(online);
    expect((await download({ offline: true, include: ['text_encoders/*'] })).files).toHaveLength(3);
    expect(hub.requests).toEqual([]);
  });

  it('says what is missing', async () => {
    expect(await refusal(download({ offline: true }))).toMatchObject({ code: 'missing-part' });
    await download({ t5: 'none' });
    const { message } = await refusal(download({ offline: true }));
    expect(message).toMatch(
      /has no "text_encoders\/t5xxl_fp16\.safetensors" and "tokenizer_3\/tokenizer\.json" of .*--offline/,
    );
    expect((await refusal(download({ offline: true, revision: 'other' }))).message).toContain('revision other');
    // A link whose content is gone is missing, too.
    await rm(blob(CHECKPOINT));
    expect((await refusal(download({ offline: true, t5: 'none' }))).message).toContain('no "sd3.5_medium.safetensors"');
  });

  it('reads what other tools have put there', async () => {
    const snapshot = join(repoFolder('a/b'), 'snapshots', COMMIT);
    await mkdir(join(repoFolder('a/b'), 'blobs'), { recursive: true });
    await mkdir(join(repoFolder('a/b'), 'refs'));
    await mkdir(snapshot, { recursive: true });
    await writeFile(join(repoFolder('a/b'), 'blobs/x'), 'x');
    await symlink('../../blobs/x', join(snapshot, 'x.safetensors'));
    await writeFile(join(repoFolder('a/b'), 'refs/main'), `${COMMIT}\n`);
    const { files } = await download({ repo: 'a/b', offline: true, include: ['*'] });
    expect(files).toEqual([{ name: 'x.safetensors', path: join(snapshot, 'x.safetensors'), size: 1 }]);
  });
});

describe('settings', () => {
  it.each([
    ['HF_HUB_CACHE before HF_HOME', { HF_HUB_CACHE: 'A', HF_HOME: 'B' }, 'A'],
    ['HF_HOME', { HF_HOME: 'B' }, 'B/hub'],
    ['XDG_CACHE_HOME', { XDG_CACHE_HOME: 'C' }, 'C/huggingface/hub'],
    ['an empty variable, which is none', { HF_HUB_CACHE: '', HF_HOME: 'B' }, 'B/hub'],
  ])('the cache is found by %s', async (_, variables, expected) => {
    const environment = Object.fromEntries(
      Object.entries(variables).map(([name, value]) => [name, value && join(folder, value)]),
    );
    const { folder: snapshot } = await downloadModel({ ...one, endpoint: hub.url, environment });
    expect(snapshot).toBe(join(folder, expected, `models--${DEFAULT_REPO.replace('/', '--')}`, 'snapshots', COMMIT));
  });

  it.each([
    ['the option', 'hf_option', { HF_TOKEN: 'hf_variable' }, 'hf_option'],
    ['HF_TOKEN', undefined, { HF_TOKEN: ' hf_variable\n' }, 'hf_variable'],
    ['the file that a login leaves', undefined, {}, 'hf_file'],
    ['HF_TOKEN_PATH', undefined, { HF_TOKEN_PATH: 'elsewhere' }, 'hf_elsewhere'],
  ])('the token is found by %s', async (_, token, variables, expected) => {
    await writeFile(join(folder, 'token'), 'hf_file\n');
    await writeFile(join(folder, 'elsewhere'), 'hf_elsewhere');
    const { HF_TOKEN_PATH } = variables as { HF_TOKEN_PATH?: string };
    const path = HF_TOKEN_PATH && { HF_TOKEN_PATH: join(folder, HF_TOKEN_PATH) };
    const environment = { HF_HOME: folder, ...variables, ...path };
    await download({ ...one, environment, ...(token && { token }) });
    expect(hub.requests[0]!.token).toBe(expected);
  });

  it('the hub is found by HF_ENDPOINT', async () => {
    await downloadModel({ ...one, cache, environment: { HF_HOME: folder, HF_ENDPOINT: `${hub.url}/` } });
    expect(hub.requests.length).toBeGreaterThan(0);
  });

  it.each<[string, DownloadOptions, RegExp]>([
    ['a model', { repo: '../evil' }, /"\.\.\/evil" is no name of a model/],
    ['a model in three parts', { repo: 'a/b/c' }, /no name of a model/],
    ['a revision', { revision: '../../evil' }, /is no revision/],
    ['an endpoint', { endpoint: 'ftp://hub' }, /"ftp:\/\/hub" is no address/],
    ['an endpoint with a password', { endpoint: 'https://me:secret@hub' }, /^(?!.*secret).* is no address/],
    ['a token with a line break', { token: 'hf_secret\nX: y' }, /^(?!.*secret).*token has characters/],
    ['patterns', { include: [] }, /no patterns/],
    ['a T5 format', { t5: 'fp4' as 'fp8' }, /no T5 format "fp4"/],
  ])('refuse what cannot be %s', async (_, options, message) => {
    expect(await refusal(download(options))).toEqual({ code: 'bad-option', message: expect.stringMatching(message) });
    expect(hub.requests).toEqual([]);
  });

  it('a model without the default files is refused with their names', async () => {
    hub.models['a/b'] = { files: { 'model.safetensors': CHECKPOINT } };
    expect(await refusal(download({ repo: 'a/b', t5: 'none' }))).toEqual({
      code: 'missing-part',
      message: expect.stringMatching(
        /a\/b has no "sd3\.5_medium\.safetensors", .* and "tokenizer\/merges\.txt"; .*--include/,
      ),
    });
  });
});
