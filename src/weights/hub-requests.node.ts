/** Requests to the hub: tried again where that can help, a limited number of times, and refusals in words. */
import { setTimeout as sleep } from 'node:timers/promises';
import { MmditxError } from '../errors.ts';
import { VERSION } from '../version.ts';
import { type HubSettings, tokenPage } from './hub-settings.node.ts';
import { quote } from './quote.ts';

export interface RetryOptions {
  /** How often a request is sent before it has failed (default 5). Pieces of a file that arrive start the count again. */
  readonly tries?: number;
  /** Milliseconds before the second try; each further one waits twice as long (default 1000). */
  readonly delay?: number;
  /** Milliseconds without a byte after which a connection counts as broken (default 60,000). */
  readonly stall?: number;
}

export interface Hub extends Pick<HubSettings, 'endpoint' | 'token'>, RetryOptions {
  readonly signal?: AbortSignal | undefined;
  /** Gets a sentence about each wait. */
  readonly onNote?: ((text: string) => void) | undefined;
}

/** What a request is about, for messages. */
export interface Subject {
  readonly repo: string;
  readonly revision: string;
  /** Name in the repository. */
  readonly file?: string;
}

/** The longest pause, in seconds, that a hub may ask for: its limits count over windows of five minutes. */
const LONGEST_PAUSE = 300;
const LONGEST_DELAY = 60_000;
/** Fewer bytes than this between two failures do not start the count of tries again: no server keeps us here forever. */
const PROGRESS_BYTES = 2 ** 20;

/** A failure that another try may mend. */
export class PassingFailure extends Error {
  readonly reason: string;
  readonly remedy: string;
  /** Seconds that the hub asks to wait. */
  readonly pause: number | undefined;

  /** @param reason and @param remedy parts of a sentence */
  constructor(reason: string, remedy: string, { pause, cause }: { pause?: number | undefined; cause?: unknown } = {}) {
    super(reason, { cause });
    this.reason = reason;
    this.remedy = remedy;
    this.pause = pause;
  }
}

/**
 * Repeats `attempt` while it ends in a {@link PassingFailure}.
 * @param position how many bytes of a file there are, which tells whether tries bring it forward
 * @throws MmditxError `io` when the tries are used up; the signal's reason
 */
export async function persist<T>(hub: Hub, attempt: () => Promise<T>, position = () => 0): Promise<T> {
  const { tries = 5, delay = 1000, signal, onNote } = hub;
  let failures = 0;
  let reached = position();
  for (;;) {
    try {
      signal?.throwIfAborted();
      return await attempt();
    } catch (error) {
      signal?.throwIfAborted();
      if (!(error instanceof PassingFailure)) throw error;
      if (position() - reached >= PROGRESS_BYTES) failures = 0;
      reached = position();
      failures++;
      const { reason, remedy, pause, cause } = error;
      if (failures >= tries || (pause ?? 0) > LONGEST_PAUSE) {
        throw new MmditxError('io', `${reason}; ${remedy}.`, { cause });
      }
      const wait = pause === undefined ? Math.min(delay * 2 ** (failures - 1), LONGEST_DELAY) : pause * 1000;
      onNote?.(`${reason}; trying again in ${Math.ceil(wait / 1000)} s (try ${failures + 1} of ${tries}).`);
      // An abort shows at the next try.
      await sleep(wait, undefined, signal ? { signal } : {}).catch(() => undefined);
    }
  }
}

/**
 * Sends one request and reads its answer with `use`, which calls `alive` whenever something has arrived.
 * @throws PassingFailure, MmditxError, the signal's reason, what `use` throws of these
 */
export async function ask<T>(
  hub: Hub,
  {
    url,
    headers,
    ...init
  }: { readonly url: string; readonly headers?: Readonly<Record<string, string>> } & RequestInit,
  subject: Subject,
  use: (response: Response, alive: () => void) => Promise<T>,
): Promise<T> {
  const { stall = 60_000, signal } = hub;
  const watch = new AbortController();
  const timer = setTimeout(() => {
    watch.abort(broken(hub, `no data for ${Math.ceil(stall / 1000)} s`));
  }, stall);
  try {
    const response = await fetch(url, {
      ...init,
      headers: {
        'User-Agent': `mmditx/${VERSION}`,
        // Ranges count bytes of the file, not of a compressed answer.
        'Accept-Encoding': 'identity',
        ...headers,
        ...(hub.token && isOnHub(hub, url) && { Authorization: `Bearer ${hub.token}` }),
      },
      signal: signal ? AbortSignal.any([watch.signal, signal]) : watch.signal,
    });
    timer.refresh();
    if (!response.ok) {
      await response.body?.cancel();
      throw refusal(hub, response, subject);
    }
    return await use(response, () => timer.refresh());
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof MmditxError || error instanceof PassingFailure) throw error;
    throw broken(hub, reasonOf(error), error);
  } finally {
    clearTimeout(timer);
    watch.abort();
  }
}

/** Listings may lead to other servers, which the token is not for. */
function isOnHub({ endpoint }: Hub, url: string): boolean {
  return new URL(url).origin === new URL(endpoint).origin;
}

export function broken({ endpoint }: Hub, reason: string, cause?: unknown): PassingFailure {
  return new PassingFailure(
    `The connection to ${endpoint} failed (${reason})`,
    'check the network and run it again, what has arrived is kept',
    { cause },
  );
}

/** Node's fetch hides what happened in the causes of its errors. */
function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  if (error.cause instanceof Error) return reasonOf(error.cause);
  return 'code' in error && typeof error.code === 'string' ? error.code : error.message;
}

/** https://huggingface.co/docs/hub/api: the status, and the header `X-Error-Code` for what is missing or gated. */
function refusal(hub: Hub, response: Response, { repo, revision, file }: Subject): MmditxError | PassingFailure {
  const { endpoint, token } = hub;
  const { status, headers } = response;
  const code = headers.get('X-Error-Code');
  const page = `${endpoint}/${repo}`;
  const getToken = `make a token at ${tokenPage(endpoint)} and give it with --token or HF_TOKEN`;
  const refuse = (message: string) => new MmditxError('io', message);
  if (status === 429) {
    const remedy = `run it again in some minutes${token ? '' : ', or with a token, which raises the limit'}`;
    return new PassingFailure(`${endpoint} asks for fewer requests (429)`, remedy, { pause: pauseOf(headers) });
  }
  // Files come from servers beside the hub, whose addresses hold for a while only: the hub's next answer has new ones.
  if (status === 408 || status >= 500 || (code === null && !isOnHub(hub, response.url))) {
    return new PassingFailure(`${endpoint} has a problem (${status})`, 'run it again later, what has arrived is kept', {
      pause: pauseOf(headers),
    });
  }
  if (code === 'GatedRepo' || status === 403) {
    if (!token) return refuse(`${repo} is gated: accept its licence at ${page}, then ${getToken}.`);
    const remedy = `log in as the token's owner, open ${page} and accept the licence there`;
    return refuse(
      `This token may not read ${repo}: ${remedy}; a fine-grained token needs the right to read public gated repositories, too.`,
    );
  }
  if (status === 401) {
    if (token)
      return refuse(`${endpoint} does not accept the token for ${repo}; ${getToken.replace('a token', 'a new one')}.`);
    return refuse(`${repo} does not exist at ${endpoint}, or is gated or private; check its name, or ${getToken}.`);
  }
  if (status === 404) {
    if (code === 'RevisionNotFound') {
      return refuse(`${repo} has no revision ${quote(revision)}; choose one of ${page}/tree/main.`);
    }
    if (file !== undefined) {
      return refuse(
        `${repo} has no file ${quote(file)} (revision ${revision}); look at ${page}/tree/main for its files.`,
      );
    }
    return refuse(
      `There is no model ${repo} at ${endpoint} (or no revision ${quote(revision)} of it); check the name.`,
    );
  }
  const about = file === undefined ? repo : `${quote(file)} of ${repo}`;
  return refuse(`${endpoint} refuses ${about} (${status}); check the name and the endpoint.`);
}

/**
 * Seconds to wait, from `Retry-After` (a number or a date) or the `t` of `RateLimit`
 * (https://huggingface.co/docs/hub/rate-limits).
 */
function pauseOf(headers: Headers): number | undefined {
  const after = headers.get('Retry-After') ?? /\bt=(\d+)/.exec(headers.get('RateLimit') ?? '')?.[1];
  if (!after) return undefined;
  const seconds = /^\d+$/.test(after) ? Number(after) : (Date.parse(after) - Date.now()) / 1000;
  return Number.isNaN(seconds) ? undefined : Math.max(seconds, 0);
}
