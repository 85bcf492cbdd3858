// What the page asks the gateway. A password is kept until the page is closed, and nowhere else.

let authorization = "";
let asking = null;

/** What the gateway answered, as JSON. Throws an Error with the sentence to show. */
export async function ask(method, path, body) {
  const headers = authorization ? { Authorization: authorization } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Error("The gateway does not answer. Is `a1111 serve` running?");
  }
  if (response.status === 401) {
    await login();
    return ask(method, path, body);
  }
  const answer = await response.json().catch(() => null);
  if (response.ok) return answer;
  const detail = answer?.detail;
  throw new Error(typeof detail === "string" ? detail : detail?.[0]?.msg ?? `The gateway answered ${response.status}.`);
}

function login() {
  document.getElementById("login-wrong").hidden = !authorization;
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("login");
    dialog.addEventListener("close", () => {
      const pair = `${document.getElementById("user").value}:${document.getElementById("password").value}`;
      authorization = `Basic ${btoa(String.fromCharCode(...new TextEncoder().encode(pair)))}`;
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
