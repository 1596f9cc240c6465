%% @doc What a save needs from its surroundings: a key, a reservation, a root, and somebody to tell.
%%
%% Two modules are such hosts: {@link erllama_cache_host_erllama}, over the application `erllama',
%% and {@link erllama_cache_store}, built in. The writer calls them in the process that saves:
%%
%% <ul>
%% <li>`identify', first, with a slot held. The save ends with its error.</li>
%% <li>`reserve', next. The save ends with its error; `already_present' is counted.</li>
%% <li>`root', next. It exits when there is no such tier server. The save ends with its error.</li>
%% <li>`check': before a small file is written; between writing and publishing any other, and each
%%   15 seconds while a long one is written or waits for its turn. After its error the temporary
%%   file goes, and the reservation is left to whose it is.</li>
%% <li>`mark_published' and `announce', when the file has its name. After their errors it
%% stays.</li>
%% <li>`count', at the end of a save that went well.</li>
%% <li>`cancel', when anything failed between `reserve' and the file's getting its name.</li>
%% </ul>
-module(erllama_cache_host).

-export([lease/0, lease_left/0, renew_every/0]).
-export_type([tier_srv/0, tier/0, identity/0, token/0, event/0]).

-type tier_srv() :: atom().
-type tier() :: disk | ram_file.
-type identity() :: {Key :: <<_:256>>, QuantByte :: byte(), Tokens :: binary()}.
%% The key, the byte that stands for the quant type, the tokens as u32 little-endian each.
-type token() :: reference().
-type event() :: {saved, erllama_cache_meta:save_reason()} | duplicate_dropped.

%% A reservation's lease. It is erllama's, and the built-in store's is the same.
-define(LEASE, 60000).
%% A save asks this often whether its reservation still stands.
-define(RENEW_EVERY, 15000).

%% The key of a save, and what the host makes it from. An error leaves nothing behind.
-callback identify(erllama_cache_meta:complete()) ->
    {ok, identity()} | {error, erllama_cache_meta:invalid()}.

%% Reserves a key for the calling process. `Size' is what the file will take, within some bytes.
-callback reserve(tier_srv(), tier(), Key :: binary(), Size :: non_neg_integer()) ->
    {ok, token()} | {error, already_present | conflict | term()}.

%% The directory to save in. Exits when the tier server is not there.
-callback root(tier_srv()) -> file:name_all() | {error, term()}.

%% Whether the reservation still stands, and renews its lease of 60 seconds.
-callback check(tier_srv(), Key :: binary(), token()) -> ok | {error, expired}.

%% The file stands in the root, though nobody has been told.
-callback mark_published(tier_srv(), Key :: binary(), token(), Root :: file:name_all()) ->
    ok | {error, expired}.

%% The save is complete. `Size' is the file's in bytes, `Header' its first 48 bytes.
-callback announce(tier_srv(), Key :: binary(), token(), Size :: pos_integer(),
                   Header :: binary(), Tokens :: binary()) ->
    ok | {error, expired}.

%% Gives the reservation up; a stale one too.
-callback cancel(tier_srv(), Key :: binary(), token()) -> ok.

%% Something to be counted has happened.
-callback count(tier_srv(), event()) -> ok.

%% @doc For how many milliseconds a reservation stands that is not renewed.
-spec lease() -> pos_integer().
lease() -> ?LEASE.

%% @doc After so many milliseconds a save renews its reservation.
-spec renew_every() -> pos_integer().
renew_every() -> ?RENEW_EVERY.

%% @doc A host that has just been asked leaves at least so many milliseconds of the lease, and need
%% not renew it while there are: the save asks again before they are over.
-spec lease_left() -> pos_integer().
lease_left() -> ?LEASE - ?RENEW_EVERY.
