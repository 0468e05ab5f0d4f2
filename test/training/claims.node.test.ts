import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, readdir, readFile, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { floats, type TensorData } from '../../src/tensor/data.ts';
import { type Claims, type DoOnceOptions, doOnce, openClaims } from '../../src/training/claims.node.ts';
import { cacheKey, type EncodedCache, openEncodedCache } from '../../src/training/encoded-cache.node.ts';

const STALE_SECONDS = 0.4;

const folders: string[] = [];
const opened: Claims[] = [];
let folder: string;
let cache: EncodedCache;
let claimsFolder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-claims-'));
  folders.push(folder);
  cache = openEncodedCache(join(folder, 'cache'));
  claimsFolder = join(folder, 'claims');
});
afterEach(() => Promise.all(opened.splice(0).map((claims) => claims.close())));
afterAll(() => Promise.all(folders.map((path) => rm(path, { recursive: true }))));

/** As another process sees the folder. */
function claimsOf(staleSeconds = STALE_SECONDS): Claims {
  const claims = openClaims(claimsFolder, { staleSeconds });
  opened.push(claims);
  return claims;
}
const claimFiles = async () => (await readdir(claimsFolder)).filter((name) => name !== '.clock').sort();
const key = cacheKey('work');
const work = (count: number) => Array.from({ length: count }, (_, i) => ({ key: cacheKey(i), item: i }));
const result = (item: number): ReadonlyMap<string, TensorData> => new Map([['value', floats([1], [item])]]);
/** A process id that nothing runs under. */
const deadPid = () => spawnSync(process.execPath, ['--version']).pid;

/** A claim file as a process of another machine leaves it. */
async function foreignClaim(secondsAgo: number, turn = 0, text?: string): Promise<string> {
  const path = join(claimsFolder, `${key}.${turn}`);
  await mkdir(claimsFolder, { recursive: true });
  await writeFile(path, text ?? JSON.stringify({ id: `foreign ${turn}`, pid: process.pid, machine: 'another' }));
  const time = Date.now() / 1000 - secondsAgo;
  await utimes(path, time, time);
  return path;
}

describe('a claim', () => {
  it('is one process’s until it is given back', async () => {
    const [a, b] = [claimsOf(), claimsOf()];
    const claim = await a.claim(key);
    expect(claim).toBeDefined();
    expect(await b.claim(key)).toBeUndefined();
    expect(await a.claim(key)).toBeUndefined();
    expect(await b.claim(cacheKey('other'))).toBeDefined();
    await claim!.release();
    expect(await b.claim(key)).toBeDefined();
  });

  it('is only one’s of many that ask at once', async () => {
    const asked = await Promise.all(Array.from({ length: 20 }, () => claimsOf().claim(key)));
    expect(asked.filter(Boolean)).toHaveLength(1);
  });

  it('is kept alive while its process is too busy to do so', async () => {
    expect(await claimsOf(1).claim(key)).toBeDefined();
    await wait(200);
    const end = Date.now() + 1500;
    while (Date.now() < end);
    expect(await claimsOf(1).claim(key)).toBeUndefined();
  });

  it('leaves nothing behind', async () => {
    const claims = claimsOf();
    await claims.claim(key);
    await (await claims.claim(cacheKey('other')))!.release();
    await claims.close();
    expect(await claimFiles()).toEqual([]);
  });

  it.each(['../other', 'a', ''])('refuses the key %j', async (bad) => {
    await expect(claimsOf().claim(bad)).rejects.toThrow(RangeError);
  });

  it('needs a folder that can be written', async () => {
    await writeFile(claimsFolder, '');
    await expect(claimsOf().claim(key)).rejects.toMatchObject({
      code: 'io',
      message: expect.stringContaining(claimsFolder),
    });
  });
});

describe('a claim that was left behind', () => {
  it('by a process of another machine is taken over once it shows no sign of life', async () => {
    await foreignClaim(0);
    const claims = claimsOf();
    expect(await claims.claim(key)).toBeUndefined();
    await wait(STALE_SECONDS * 1000 + 100);
    expect(await claims.claim(key)).toBeDefined();
  });

  it('by a process of this machine that has ended is taken over at once', async () => {
    const claims = claimsOf(1000);
    await claims.claim(key);
    const path = join(claimsFolder, `${key}.0`);
    await writeFile(path, JSON.stringify({ ...JSON.parse(await readFile(path, 'utf8')), pid: deadPid() }));
    expect(await claimsOf(1000).claim(key)).toBeDefined();
  });

  it.each(['', 'nothing', '{"pid":-1}'])('with %j in it is taken over', async (text) => {
    await foreignClaim(1, 0, text);
    expect(await claimsOf().claim(key)).toBeDefined();
  });

  it('is taken over by only one of many', async () => {
    await foreignClaim(1);
    await foreignClaim(1, 1);
    const asked = await Promise.all(Array.from({ length: 20 }, () => claimsOf().claim(key)));
    expect(asked.filter(Boolean)).toHaveLength(1);
    await asked.find(Boolean)!.release();
    expect(await claimFiles()).toEqual([]);
  });

  it('stays the new owner’s when the old one wakes up', async () => {
    const [sleeper, other] = [claimsOf(), claimsOf()];
    const old = await sleeper.claim(key);
    // What suspending the process does, as seen from outside.
    const path = await foreignClaim(1, 0, await readFile(join(claimsFolder, `${key}.0`), 'utf8'));
    const taken = await other.claim(key);
    expect(taken).toBeDefined();
    await old!.release();
    expect(await claimsOf().claim(key)).toBeUndefined();
    await taken!.release();
    await expect(stat(path)).rejects.toThrow('ENOENT');
    expect(await claimFiles()).toEqual([]);
  });

  it('is judged by the folder’s clock, not by this machine’s', async () => {
    const now = Date.now;
    try {
      Date.now = () => now() + 3_600_000;
      await foreignClaim(3600);
      expect(await claimsOf().claim(key)).toBeUndefined();
    } finally {
      Date.now = now;
    }
  });

  it('is swept away when its work is done', async () => {
    await foreignClaim(1);
    const claims = claimsOf();
    await claims.sweep(async () => false);
    expect(await claimFiles()).toHaveLength(1);
    await claims.sweep(async (found) => found === key);
    expect(await claimFiles()).toEqual([]);
  });
});

describe('shared work', () => {
  const options = (changed: Partial<DoOnceOptions<number>> = {}): DoOnceOptions<number> => ({
    cache,
    claims: claimsOf(),
    batch: async (items) => items.map(result),
    ...changed,
  });

  it('is done in batches, each piece once, and kept', async () => {
    const batches: (readonly number[])[] = [];
    const progress: { done: number; total: number }[] = [];
    await doOnce(
      [...work(10), ...work(3)],
      options({
        batchSize: 4,
        batch: async (items) => {
          batches.push(items);
          return items.map(result);
        },
        onProgress: (now) => progress.push(now),
      }),
    );
    expect(batches.map(({ length }) => length)).toEqual([4, 4, 2]);
    expect(batches.flat().sort((a, b) => a - b)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(progress.map(({ done }) => done)).toEqual([4, 8, 10]);
    for (const { key, item } of work(10))
      expect((await cache.read(key))!.get('value')!.data).toEqual(Float32Array.of(item));
    expect(await claimFiles()).toEqual([]);
  });

  it('that is done already is not done again', async () => {
    await doOnce(work(3), options());
    const done: number[] = [];
    const batch = async (items: readonly number[]) => {
      done.push(...items);
      return items.map(result);
    };
    await doOnce(work(5), options({ batch }));
    expect(done.sort()).toEqual([3, 4]);
    await doOnce([], options({ batch }));
  });

  it('runs as many batches at once as it may', async () => {
    let running = 0;
    let most = 0;
    const batch = async (items: readonly number[]) => {
      most = Math.max(most, ++running);
      await wait(5);
      running--;
      return items.map(result);
    };
    await doOnce(work(9), options({ batchSize: 1, batch }));
    expect(most).toBe(1);
    await doOnce(work(18).slice(9), options({ batchSize: 1, atOnce: 3, batch }));
    expect(most).toBe(3);
  });

  it('goes on without pieces that are bad, and says which', async () => {
    const skipped: [number, string][] = [];
    const batch = async (items: readonly number[]) => {
      for (const item of items) {
        if (item % 4 === 1) throw new MmditxError('bad-file', `${item}.png is damaged.`);
      }
      return items.map(result);
    };
    await doOnce(work(8), options({ batch, onSkip: (item, { message }) => skipped.push([item, message]) }));
    expect(skipped.sort()).toEqual([
      [1, '1.png is damaged.'],
      [5, '5.png is damaged.'],
    ]);
    const present = await Promise.all(work(8).map(({ key }) => cache.has(key)));
    expect(present.map((has, i) => has || i)).toEqual([true, 1, true, true, true, 5, true, true]);
    expect(await claimFiles()).toEqual([]);
  });

  it.each([new MmditxError('io', 'The disk is full.'), new RangeError('wrong')])('ends with %s', async (error) => {
    const batch = async () => Promise.reject(error);
    await expect(doOnce(work(9), options({ batch, batchSize: 2, atOnce: 2 }))).rejects.toBe(error);
    expect(await claimFiles()).toEqual([]);
  });

  it('stops with the signal’s reason, and gives its claims back', async () => {
    const stop = new AbortController();
    const reason = new Error('enough');
    let batches = 0;
    const batch = async (items: readonly number[]) => {
      if (++batches === 2) stop.abort(reason);
      return items.map(result);
    };
    await expect(doOnce(work(9), options({ batch, batchSize: 2, signal: stop.signal }))).rejects.toBe(reason);
    expect(batches).toBe(2);
    expect(await claimFiles()).toEqual([]);
  });

  it('waits for what others do, and stops waiting with the signal’s reason', async () => {
    const [first] = work(1);
    const other = await claimsOf().claim(first!.key);
    const done: number[] = [];
    const batch = async (items: readonly number[]) => {
      done.push(...items);
      return items.map(result);
    };
    const stop = new AbortController();
    const reason = new Error('enough');
    setTimeout(() => stop.abort(reason), 150);
    await expect(doOnce(work(2), options({ batch, signal: stop.signal }))).rejects.toBe(reason);
    setTimeout(async () => {
      await cache.write(first!.key, result(0));
      await other!.release();
    }, 100);
    await doOnce(work(2), options({ batch }));
    expect(done).toEqual([1]);
  });
});

describe('three processes', () => {
  const KEYS = 400;
  const BATCH = 4;
  /** Encodes 5 ms for each key and writes down what it begins and what it has finished. */
  const worker = `
    import { appendFileSync } from 'node:fs';
    import { setTimeout as wait } from 'node:timers/promises';
    import { doOnce, openClaims } from './src/training/claims.node.ts';
    import { cacheKey, openEncodedCache } from './src/training/encoded-cache.node.ts';
    const folder = process.argv[1];
    const note = (text) => appendFileSync(folder + '/log', text + '\\n');
    const cache = openEncodedCache(folder + '/cache');
    const noted = { ...cache, write: async (key, tensors) => { await cache.write(key, tensors); note('wrote ' + key); } };
    const claims = openClaims(folder + '/claims', { staleSeconds: 1 });
    const work = Array.from({ length: ${KEYS} }, (_, item) => ({ key: cacheKey(item), item }));
    process.stdout.write('begun');
    await doOnce(work, {
      cache: noted, claims, batchSize: ${BATCH}, batch: (items) => Promise.all(items.map(async (item, i) => {
        note('began ' + cacheKey(item));
        await wait(5 * (i + 1));
        return new Map([['value', { dtype: 'float32', shape: [1], data: Float32Array.of(item) }]]);
      })),
    });
    await claims.close();
  `;
  const children = new Set<ChildProcess>();
  afterEach(() => {
    for (const child of children) child.kill('SIGKILL');
  });

  /** A worker that has begun, and its end. */
  async function start(): Promise<{ child: ChildProcess; exit: Promise<number | null> }> {
    const child = spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '--eval', worker, '--', folder], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    children.add(child);
    const exit = once(child, 'exit').then(([code]) => code as number | null);
    await Promise.race([once(child.stdout!, 'data'), exit]);
    return { child, exit };
  }

  async function log(): Promise<Record<'began' | 'wrote', string[]>> {
    const lines = (await readFile(join(folder, 'log'), 'utf8')).trim().split('\n');
    const of = (what: string) => lines.filter((line) => line.startsWith(what)).map((line) => line.split(' ')[1]!);
    return { began: of('began'), wrote: of('wrote') };
  }

  async function expectAllDone() {
    for (const { key, item } of work(KEYS)) expect((await cache.read(key))?.get('value')?.data[0]).toBe(item);
    expect(await claimFiles()).toEqual([]);
  }

  it('that are killed and started again do all work, and none of it twice', async () => {
    const workers = await Promise.all([start(), start(), start()]);
    let rounds = 0;
    for (; rounds < 3; rounds++) {
      await wait(50);
      const killed = [rounds % 3, (rounds + 1) % 3];
      for (const i of killed) workers[i]!.child.kill('SIGKILL');
      await Promise.all(killed.map((i) => workers[i]!.exit));
      // A slow machine takes so long to start processes that one does all the work.
      expect((await log()).wrote.length).toBeLessThan(rounds === 0 ? KEYS : KEYS + 1);
      await Promise.all(killed.map(async (i) => Object.assign(workers[i]!, await start())));
    }
    expect(await Promise.all(workers.map(({ exit }) => exit))).toEqual([0, 0, 0]);
    const { began, wrote } = await log();
    expect(new Set(wrote).size).toBe(wrote.length);
    expect(new Set(began).size).toBe(KEYS);
    // What a process that was killed had begun, and no more.
    expect(began.length).toBeLessThanOrEqual(KEYS + 2 * rounds * BATCH);
    await expectAllDone();
  }, 20_000);

  it('of which one is suspended do its work without it', async () => {
    const workers = await Promise.all([start(), start(), start()]);
    await wait(100);
    const sleeper = workers[0]!;
    sleeper.child.kill('SIGSTOP');
    expect(await Promise.all(workers.slice(1).map(({ exit }) => exit))).toEqual([0, 0]);
    for (const { key } of work(KEYS)) expect(await cache.has(key)).toBe(true);
    sleeper.child.kill('SIGCONT');
    expect(await sleeper.exit).toBe(0);
    await expectAllDone();
  }, 20_000);
});
