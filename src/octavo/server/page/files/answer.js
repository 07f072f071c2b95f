/** An answer while it arrives. */

import { ApiError, streamChat } from "./api.js";
import { tokensOf } from "./probabilities.js";

/** An answer that is being written. What arrives is drawn once per frame. */
export class Answer {
  constructor(message, view, drawn) {
    this.message = message;
    this.drawn = drawn;
    this.controller = new AbortController();
    this.frame = 0;
    this.ended = new Promise((resolve) => {
      this.end = resolve;
    });
    this.attach(view);
  }

  /** Draw into another view from now on. */
  attach(view) {
    this.view = view;
    view.grow();
  }

  /** End the request. */
  stop() {
    this.controller.abort();
  }

  /** Read the stream of a request to its end. */
  async read(body) {
    const { message } = this;
    const began = performance.now();
    let first = 0;
    try {
      for await (const chunk of streamChat(body, this.controller.signal)) {
        const [choice] = chunk.choices;
        if (chunk.usage) message.usage = { prompt: chunk.usage.prompt_tokens, answer: chunk.usage.completion_tokens };
        if (!choice) continue;
        const { content, reasoning_content: reasoning } = choice.delta;
        if (content || reasoning) first ||= performance.now();
        if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
        if (content) message.content += content;
        if (choice.logprobs?.content && !reasoning) (message.tokens ??= []).push(...tokensOf(choice.logprobs.content));
        if (choice.finish_reason) message.finish = choice.finish_reason;
        this.frame ||= requestAnimationFrame(() => this.#draw());
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else message.error = error instanceof ApiError ? error.message : "The connection to the server was lost.";
    }
    cancelAnimationFrame(this.frame);
    if (first) message.times = { first: first - began, rest: performance.now() - first };
    this.end();
  }

  #draw() {
    this.frame = 0;
    this.view.update();
    this.drawn();
  }
}
