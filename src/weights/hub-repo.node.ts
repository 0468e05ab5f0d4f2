/** What a repository on the hub has: its files, and the licence its model card names. */
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { COMMIT, type HubFile, isInside } from './hub-cache.node.ts';
import { ask, type Hub, persist } from './hub-requests.node.ts';
import { quote } from './quote.ts';

export interface HubLicence {
  /** As the model card has it, such as `apache-2.0`; undefined where the card names none. */
  readonly name: string | undefined;
  /** Where its text is. */
  readonly link: string | undefined;
  /** Whether the hub asks for an agreement on the model's page before it gives the files out. */
  readonly gated: boolean;
  /** All of that in words for people. */
  readonly summary: string;
}

export interface HubRepo {
  readonly commit: string;
  readonly licence: HubLicence;
  readonly files: readonly HubFile[];
}

const STABILITY_LICENCE_LINK = 'https://stability.ai/community-license-agreement';
/** `license_name` of Stable Diffusion 3.5's model card. */
const STABILITY_LICENCE = 'stabilityai-ai-community';
/** Models that are under it where a card says nothing. */
const STABILITY_MODELS = /^stabilityai\/stable-diffusion-3/;

/** Bounds on what a hub may answer: bytes of one answer, answers of one listing, files, their names and bytes. */
const MAX_ANSWER_BYTES = 2 ** 25;
const MAX_ANSWERS = 100;
const MAX_FILES = 100_000;
const MAX_NAME_LENGTH = 4096;
const MAX_FILE_BYTES = 2 ** 42;

const infoSchema = z.object({ sha: z.string().regex(COMMIT), gated: z.unknown() });
const cardSchema = z
  .object({
    license: z.union([z.string(), z.array(z.string()).transform((names) => names.join(', '))]).optional(),
    license_name: z.string().optional(),
    license_link: z.string().optional(),
  })
  .catch({});
const size = z.int().nonnegative().max(MAX_FILE_BYTES);
const entrySchema = z.object({
  path: z.string().max(MAX_NAME_LENGTH),
  size,
  oid: z.string().regex(COMMIT),
  lfs: z.object({ oid: z.string().regex(/^[0-9a-f]{64}$/), size }).optional(),
});

/**
 * Asks a hub about a model.
 * @param revision a branch, a tag or a commit
 * @throws MmditxError `io` when it cannot be reached or refuses, `bad-file` when its answer makes no sense; the
 *   signal's reason
 */
export async function hubRepo(hub: Hub, repo: string, revision: string): Promise<HubRepo> {
  // Loaded here: other commands start without it.
  const { listFiles, modelInfo } = await import('@huggingface/hub');
  const hubUrl = hub.endpoint;
  const fetch = boundedFetch(hub, { repo, revision });
  try {
    const info = await modelInfo({ name: repo, revision, additionalFields: ['sha', 'cardData'], hubUrl, fetch });
    const { sha: commit, gated } = infoSchema.parse(info);
    const card = cardSchema.parse(info.cardData);
    const files: HubFile[] = [];
    for await (const entry of listFiles({
      repo: { type: 'model', name: repo },
      revision: commit,
      recursive: true,
      hubUrl,
      fetch,
    })) {
      if (entry.type !== 'file') continue;
      if (files.length === MAX_FILES) throw new Error(`more than ${MAX_FILES} files`);
      const { path: name, size, oid, lfs } = entrySchema.parse(entry);
      files.push({ name, size: lfs?.size ?? size, hash: lfs?.oid ?? oid });
    }
    return { commit, files, licence: licenceOf(hub, repo, commit, card, gated === 'auto' || gated === 'manual') };
  } catch (error) {
    hub.signal?.throwIfAborted();
    if (error instanceof MmditxError) throw error;
    throw new MmditxError(
      'bad-file',
      `${hub.endpoint} gives an answer about ${repo} that makes no sense; check the endpoint and the network.`,
      { cause: error },
    );
  }
}

/** @throws MmditxError `bad-file` when a name leads out of the folder it is to lie in */
export function requireInside({ name }: HubFile, repo: string): void {
  if (isInside(name)) return;
  throw new MmditxError(
    'bad-file',
    `${repo} has a file called ${quote(name)}, which would lie outside its folder; choose other files or another model.`,
  );
}

/** `fetch` for the library that knows the hub's API: with retries, and without answers that never end. */
function boundedFetch(hub: Hub, subject: { repo: string; revision: string }): typeof fetch {
  let answers = 0;
  return async (input, init = {}) => {
    answers++;
    if (answers > MAX_ANSWERS) throw new Error(`more than ${MAX_ANSWERS} pages`);
    const url = input instanceof Request ? input.url : String(input);
    const headers = Object.fromEntries(new Headers(init.headers));
    return await persist(hub, () =>
      ask(hub, { ...init, url, headers }, subject, async (response, alive) => {
        const { status } = response;
        return new Response(await readBounded(response, alive), { status, headers: response.headers });
      }),
    );
  };
}

async function readBounded({ body }: Response, alive: () => void): Promise<Blob> {
  const chunks: Uint8Array<ArrayBuffer>[] = [];
  let bytes = 0;
  for await (const chunk of body ?? []) {
    alive();
    bytes += chunk.length;
    if (bytes > MAX_ANSWER_BYTES) {
      throw new MmditxError('bad-file', 'The hub gives an answer without end; check the endpoint.');
    }
    chunks.push(chunk);
  }
  return new Blob(chunks);
}

function licenceOf(
  hub: Hub,
  repo: string,
  commit: string,
  card: z.infer<typeof cardSchema>,
  gated: boolean,
): HubLicence {
  const page = `${hub.endpoint}/${repo}`;
  const given = card.license === 'other' ? (card.license_name ?? card.license) : card.license;
  const name = given ?? (STABILITY_MODELS.test(repo) ? STABILITY_LICENCE : undefined);
  const link =
    name === STABILITY_LICENCE ? STABILITY_LICENCE_LINK : linkOf(card.license_link, `${page}/blob/${commit}/`);
  const agreement = gated ? ` Accept it on the model's page first: ${page}` : '';
  return { name, link, gated, summary: `${licenceTerms(repo, page, name, link)}${agreement}` };
}

function licenceTerms(repo: string, page: string, name: string | undefined, link = page): string {
  if (name === STABILITY_LICENCE) {
    return (
      `${repo} is under the Stability AI Community License: free for research, for non-commercial use, and for ` +
      `commercial use by people and organizations with less than US$ 1M of yearly revenue (${link}).`
    );
  }
  if (name === undefined) return `${repo} names no licence: find out on its page what it may be used for (${page}).`;
  return `${repo} is under the licence ${quote(name)} (${link}).`;
}

/** Cards have addresses or names of files. */
function linkOf(text: string | undefined, base: string): string | undefined {
  if (text === undefined || text.length > 1000 || !URL.canParse(text, base)) return undefined;
  const { protocol, href } = new URL(text, base);
  return /^https?:$/.test(protocol) ? href : undefined;
}
